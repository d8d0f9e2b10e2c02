"""A few elements of what flows through a chain, and the numbers that say how a run is doing."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adam_jax._configuration import applied_rates
from adam_jax._context import Context
from adam_jax._hyperparams import cast
from adam_jax._moments import Moments, by_leaf
from adam_jax._paths import Parameters, is_scale, owner
from adam_jax._spec import all_specs
from adam_jax._transformation import Transformation, take_step
from adam_jax._tree import PyTree, as_wide, is_half, square, takes_part, times

LEAVES = 32
"""So many leaves of a group are looked at: a few operations for each of a thousand leaves would be minutes of compiling."""

SLICED = 16
"""The largest stride of a slice. For larger ones a TPU's compiler copies codes, or wants more of the chip's own memory than there
is; to gather takes longer to compile."""

Vectors: TypeAlias = dict[str, Array]


class Row(NamedTuple):
    """Elements taken from one leaf, or from several.

    Attributes:
      of: what is known of them, float32 vectors by name.
      weights: how many elements of its leaf each stands for.
    """

    of: Vectors
    weights: np.ndarray

    def mean(self, name: str, among: str | None = None) -> Array:
        """The mean; of nothing, 0."""
        weights = self.weights * (np.float32(1) if among is None else self.of[among])
        return jnp.sum(weights * self.of[name]) / _unless_0(jnp.sum(weights))

    def rms(self, x: Array, among: str | None = None) -> Array:
        """The root mean square of a vector beside these."""
        top = jnp.max(jnp.abs(x), initial=0)
        scaled = x / _unless_0(top)  # squares overflow
        return top * jnp.sqrt(self._replace(of=self.of | {"x": scaled * scaled}).mean("x", among))

    def quantile(self, q: float, x: Array, among: str) -> Array:
        """The quantile of a vector beside these; of nothing, 0."""
        inorder, weights = lax.sort((x, jnp.asarray(self.weights) * self.of[among]), num_keys=1)
        reached = jnp.cumsum(weights)
        place = jnp.sum(reached < np.float32(q) * reached[-1])
        found = jnp.where(reached[-1] > 0, inorder[jnp.minimum(place, len(x) - 1)], 0)
        poisoned = jnp.any(jnp.isnan(inorder) & (weights > 0))  # they are sorted behind all others
        return jnp.where(poisoned, np.float32(np.nan), found)


def _stacked(rows: Sequence[Row]) -> Row:
    """All of them as one, with leaves that have elements alone."""
    rows = [row for row in rows if row.weights.size]
    if not rows:
        return Row({}, np.zeros(0, np.float32))
    return Row(
        {name: jnp.concatenate([row.of[name] for row in rows]) for name in rows[0].of},
        np.concatenate([row.weights for row in rows]),
    )


class Seen(NamedTuple):
    """What there is to see of a step: elements, and the gradient.

    Attributes:
      gradient: its norm.
      moved: updates and parameters.
      quotients: moments, and the directions that were made of them.
      unrounded: which 16-bit parameters the update would not move.
      codes: which are at an end.
      skipped: the counts of guards.
    """

    gradient: Array
    moved: Row
    quotients: Row
    unrounded: Row
    codes: Row
    skipped: list[Array]

    def metrics(self) -> dict[str, Array]:
        """Float32 scalars by the names in `METRICS`; 0 of what there is not."""
        found = {"gradient_norm": self.gradient, "skipped": sum(count.astype(np.float32) for count in self.skipped)}
        if self.moved.of:
            step, length = (self.moved.rms(self.moved.of[name]) for name in ("update", "parameter"))
            found |= {"update_rms": step, "update_ratio": step / _unless_0(length)}
        if self.quotients.of:
            found |= self._quotient_metrics()
        if self.unrounded.of:
            found["unmoved_share"] = self.unrounded.mean("stays", "moves")
        if self.codes.of:
            found["ends_share"] = self.codes.mean("ends")
        return {name: jnp.asarray(found.get(name, 0), np.float32) for name in METRICS}

    def _quotient_metrics(self) -> dict[str, Array]:
        rows = self.quotients
        its = rows.of
        g, m = (its[name] / _unless_0(rows.rms(its[name])) for name in ("gradient", "mean"))
        turned = rows._replace(of={"along": its["turn"] * g * m})
        return {
            "learning_rate_median": rows.quantile(0.5, its["rate"], "directed"),
            "learning_rate_p99": rows.quantile(0.99, its["rate"], "directed"),
            "eps_share": rows.mean("ruled_by_eps", "has_nu"),
            "normalized_gradient_rms": rows.rms(its["normalized"], "sized"),
            "momentum_cosine": turned.mean("along"),
            "signal_to_noise": rows.quantile(0.5, its["signal"], "sized"),
        }


METRICS = (
    "gradient_norm",
    "update_rms",
    "update_ratio",
    "learning_rate_median",
    "learning_rate_p99",
    "eps_share",
    "normalized_gradient_rms",
    "momentum_cosine",
    "signal_to_noise",
    "unmoved_share",
    "ends_share",
    "skipped",
)
"""What is measured, of all parameters and of each group. `adam_jax.observe` says what they mean."""


class Probe:
    """Follows the updates through a chain, and into each group inside, with a few elements of every leaf.

    The stages run on these few once more. To take them from what the stages make would be shorter; but XLA would then keep whole
    arrays for it, of directions and updates, which otherwise never leave the registers.

    Args:
      quota: how many elements of a leaf to take, from how many it has.
    """

    def __init__(self, quota: Callable[[int], int]) -> None:
        self.quota = quota
        self.groups: dict[str, Probe] = {}
        self.flowing: Any = None
        self.lost = False
        self.quotients: list[tuple[Any, Moments, Any, PyTree]] = []
        self.gate: Any = None
        self.whole: tuple[PyTree, PyTree, Any, Any, PyTree] = (None, None, None, None, None)

    def group(self, name: str) -> Probe:
        """The probe of a group."""
        self.groups[name] = Probe(self.quota)
        return self.groups[name]

    def follow(self, part: Any, updates: Any, state: Any, params: PyTree, context: Context) -> None:
        """Runs a stage on the elements, from the first that makes moments, or stands behind groups, to the one that rounds."""
        begun = self.flowing is not None or bool(self.groups)
        self.gate = context.gate or self.gate
        if not isinstance(part, Transformation):
            self.lost = begun
        elif part.init.spec.stages or part.init.spec.inner or part.flow.end or self.lost:
            return
        elif begun or part.flow.gives == "moments":
            shapes = _shapes(params)
            few = functools.partial(self._few, shapes=shapes)
            taken = few(updates) if self.flowing is None else self.flowing
            gradient = None if context.gradient is None else few(context.gradient)
            inner = context._replace(gradient=gradient, probe=None)
            given, _ = take_step(part, taken, few(state), few(params), inner)
            if isinstance(taken, Moments) and not isinstance(given, Moments) and not context.applied:
                self.quotients.append((part, taken, few(state), given))
            self.flowing = given

    def end(self, tx: Any, gradient: PyTree, made: PyTree, before: Any, params: PyTree) -> None:
        """Looks at the whole step: the transformation, what came in, what came out, the state before it, the parameters."""
        self.whole = tx, gradient, made, before, params

    def seen(self, name: str = "all", rate: Any = None) -> dict[str, Seen]:
        """What there is to see of all and of each group."""
        tx, gradient, made, state, params = self.whole
        rates = [its() for group, its in applied_rates(tx, state) if not group]
        rate = rates[-1] if rates else rate
        groups: dict[str, Seen] = {}
        within = []
        for label, its in self.groups.items():
            path = label if name == "all" else f"{name}/{label}"
            groups |= its.seen(path, rate)
            within.append(groups[path])
        shapes = _shapes(params)
        sizes = [math.prod(shape) for shape in shapes.values()]
        if within and self.flowing is None and not self.lost:
            moved, unrounded = [its.moved for its in within], [its.unrounded for its in within]
        else:
            updates = self._few(made, shapes) if self.flowing is None or self.lost else self.flowing
            if self.gate is not None:
                taken = self.gate.takes
                updates = jax.tree.map(lambda x: jnp.where(taken, x, jnp.zeros_like(x)) if takes_part(x) else x, updates)
            old = self._few(params, shapes)
            moved, unrounded = _rows(_moved, sizes, updates, old), _rows(_unmoved, sizes, updates, old)
        stages = [_quotient(sizes, *found) for found in self.quotients]
        quotients = [_applied(functools.reduce(_followed, rows), rate) for rows in zip(*stages, strict=True)]
        moments = _moments_of(tx)
        held = jax.tree_util.tree_flatten_with_path(state)[0]
        few = jax.tree.leaves(self._few(state, shapes))
        codes = [
            _row(_at_ends, whole.size, some)
            for (path, whole), some in zip(held, few, strict=True)
            if _is_field(path, whole, moments, shapes) and not takes_part(whole)
        ]
        here = Seen(
            gradient=_norm(*map(_taking_part, (gradient, self._few(gradient, shapes)))),
            moved=_stacked(moved),
            quotients=_stacked(quotients + [its.quotients for its in within]),
            unrounded=_stacked(unrounded),
            codes=_stacked(codes),
            skipped=[x for path, x in held if _is_field(path, x, ("skipped",), shapes)],
        )
        return {name: here, **groups}

    def _few(self, tree: PyTree, shapes: Parameters) -> PyTree:
        """The tree with some elements of each array that belongs to a parameter, at the same places in all of them."""
        chosen = _chosen(shapes)

        def leaf(path: Any, x: Any) -> Any:
            whole = owner(path, jnp.shape(x), shapes)
            if whole is None:
                return x
            return self._take(jnp.asarray(x), shapes[whole]) if whole in chosen else jnp.asarray(x)[:0]

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def _take(self, leaf: Array, shape: tuple[int, ...]) -> Array:
        """Elements from a grid as wide as the quota wants it. It is cut as the leaf is, over many devices too."""
        strides = [1] * len(shape)
        while math.prod(-(-n // s) for n, s in zip(shape, strides, strict=True)) > self.quota(math.prod(shape)):
            longest = max(range(len(shape)), key=lambda i: shape[i] / strides[i])
            strides[longest] *= 2
        strides = [s if n > 1 else 1 for n, s in zip(leaf.shape, strides, strict=True)]  # an axis along which ν is shared
        # From the middle of a cell: the first row of a table is often one of a kind.
        starts = [min(s // 2, max(n - 1, 0)) for n, s in zip(leaf.shape, strides, strict=True)]
        if max(strides, default=1) <= SLICED:
            return lax.slice(leaf, starts, leaf.shape, strides)
        places = jnp.ix_(*(np.arange(start, n, s) for start, n, s in zip(starts, leaf.shape, strides, strict=True)))
        taken: Array = leaf.at[places].get(indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")
        return taken


def _chosen(shapes: Parameters) -> set[Any]:
    """The leaves that are looked at: the largest, and of those that are alike some from everywhere."""

    def rank(path: Any) -> tuple[int, int]:
        return -math.prod(shapes[path]), zlib.crc32(jax.tree_util.keystr(path).encode())

    return set(sorted(shapes, key=rank)[:LEAVES])


def sights(tx: Any, params: PyTree, state: Any) -> set[str]:
    """The names in `METRICS` that there is something to see of."""
    found = {"gradient_norm", "update_rms", "update_ratio"}
    stages = [spec for spec in all_specs(tx) if spec.is_stage]
    tracking = [spec for spec in stages if spec.flow.gives == "moments" and spec.flow.takes != "moments"]
    if tracking:
        found |= {"learning_rate_median", "learning_rate_p99", "momentum_cosine"}
    moments = _moments_of(tx)
    if any(not slot.signed for spec in tracking for slot in spec.definition.slots):
        found |= {"eps_share", "normalized_gradient_rms", "signal_to_noise"}
    if any(map(is_half, jax.tree.leaves(params))):
        found.add("unmoved_share")
    shapes = _shapes(params)
    for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        if not takes_part(x) and _is_field(path, x, moments, shapes):
            found.add("ends_share")
        if _is_field(path, x, ("skipped",), shapes):
            found.add("skipped")
    return found


def _moments_of(tx: Any) -> tuple[str, ...]:
    """Returns the fields of all moments that the stages of a transformation keep."""
    return tuple(slot.name for spec in all_specs(tx) for slot in spec.definition.slots)


def _quotient(sizes: list[int], part: Any, moments: Moments, state: Any, given: PyTree) -> list[Row]:
    """What a stage made of moments."""
    root = part.init.spec.definition.root
    hypers = part.init.spec.definition.hyperparameters.at(moments.count - 1, getattr(state, "hyperparams", {}))
    eps, eps_root = (cast(hypers.get(name, 0.0), np.float32) for name in ("eps", "eps_root"))
    both = (moments.mu_weight, moments.mu_rate), (moments.nu_weight, moments.nu_rate)
    mu_weight, nu_weight = (by_leaf(_gathered(rate, moments.count) if weight is None else weight) for weight, rate in both)

    def see(grad: Array, mu: Array, direction: Array, nu: Array | None = None) -> Vectors:
        g, m, d = map(_size, (grad, mu, direction))
        v = jnp.zeros_like(g) if nu is None else jnp.broadcast_to(_single(nu), g.shape)
        size, whole = (jnp.sqrt(x) if root else x for x in (v, _single(nu_weight())))
        more = eps + (jnp.sqrt(v + eps_root) - size if root else 0)
        corrected = _unless_0(size / whole)
        mean = m / _single(mu_weight())
        return {
            "gradient": g,
            "mean": mean,
            "turn": _turn(grad, mu),
            "rate": d / _unless_0(m),
            "directed": _single(m != 0),
            "normalized": g / corrected,
            "signal": mean / corrected,
            "sized": _single(size != 0),
            "ruled_by_eps": jnp.where(jnp.isnan(size), size, _single(more > size)),
            "has_nu": jnp.full_like(g, nu is not None),
        }

    return _rows(see, sizes, moments.grad, moments.mu, given, *([] if moments.nu is None else [moments.nu]))


def _gathered(rate: Array, count: Array) -> Array:
    """The weight of a moment that is not corrected, which no state keeps: what it is if the decay has always been this one."""
    return -jnp.expm1(count.astype(rate.dtype) * jnp.log1p(-rate))


def _followed(first: Row, then: Row) -> Row:
    """What two stages made of the same elements, as in ADOPT: the ν of one, and the μ of the other, in units of its root."""
    a, b = first.of, then.of
    made = {name: jnp.where(b["has_nu"] > 0, b[name], a[name]) for name in ("normalized", "sized", "ruled_by_eps", "has_nu")}
    made["signal"] = jnp.where(b["has_nu"] > 0, b["signal"], b["mean"])
    return then._replace(of=b | made | {name: a[name] * b[name] for name in ("rate", "directed")})


def _applied(row: Row, rate: Any) -> Row:
    """Rates of elements, of which those of all are known now."""
    return row._replace(of=row.of | {"rate": row.of["rate"] * cast(0.0 if rate is None else rate, np.float32)})


def _rows(see: Callable[..., Vectors | None], sizes: list[int], *trees: PyTree) -> list[Row]:
    """What `see` makes of the elements of each leaf, of which there are so many in the whole one."""
    return [_row(see, size, *leaves) for size, *leaves in zip(sizes, *map(_taking_part, trees), strict=True)]


def _row(see: Callable[..., Vectors | None], size: int, *leaves: Array) -> Row:
    found = {name: x.reshape(-1) for name, x in (see(*leaves) or {}).items()}
    taken = leaves[0].size if found else 0
    return Row(found, np.full(taken, size / max(taken, 1), np.float32))


def _moved(update: Array, param: Array) -> Vectors:
    return {"update": _size(update), "parameter": _size(param)}


def _unmoved(update: Array, param: Array) -> Vectors | None:
    """Whether rounding to nearest loses the update."""
    if not is_half(param):
        return None
    new = (as_wide(param) + _single(update)).astype(param.dtype)
    moves = update != 0
    return {"stays": _single(moves & (new == param)), "moves": _single(moves)}


def _at_ends(code: Array) -> Vectors:
    """Whether codes are the largest or the smallest but 0."""
    size = jnp.abs(code.astype(np.int32))
    return {"ends": _single((size == np.int32(np.iinfo(code.dtype).max)) | (size == 1))}


def _norm(leaves: Sequence[Array], some: Sequence[Array]) -> Array:
    """The Euclidean norm of all leaves together, in one pass and in units of about the largest of some elements of theirs.

    Squares of what is larger than 1e19, or smaller than 1e-19, are no numbers of float32. The largest of all elements would need
    another pass.
    """
    top = functools.reduce(jnp.maximum, (jnp.max(_size(its), initial=0) for its in some), jnp.zeros((), np.float32))
    top = jnp.where(jnp.isfinite(top) & (top > 0), top, 1)
    # A power of two, which rounds nothing, and the reciprocal of which is one as well.
    unit = lax.reduce_precision(lax.clamp(np.float32(2.0**-100), top, np.float32(2.0**100)), exponent_bits=8, mantissa_bits=0)
    each = (jnp.sum(square(times(as_wide(leaf), 1 / unit))).astype(np.float32) for leaf in leaves)
    return unit * jnp.sqrt(sum(each, jnp.zeros((), np.float32)))


def _unless_0(x: Array) -> Array:
    """A divisor; NaN stays."""
    return jnp.where(x == 0, 1, x)


def _turn(grad: Array, mu: Array) -> Array:
    """The cosine between an element of the gradient and of its mean."""

    def parts(x: Array) -> list[Array]:
        size = _unless_0(jnp.abs(x))
        return [its / size for its in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]

    return _single(sum(g * m for g, m in zip(parts(as_wide(grad)), parts(as_wide(mu)), strict=True)))


def _size(x: Array) -> Array:
    return _single(jnp.abs(x))


def _single(x: Any) -> Array:
    return x.astype(np.float32)  # type: ignore[no-any-return]


def _taking_part(tree: PyTree) -> list[Array]:
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree) if takes_part(leaf)]


def _shapes(params: PyTree) -> Parameters:
    """The shapes of the leaves that take part, by their paths."""
    located = jax.tree_util.tree_flatten_with_path(params)[0]
    return Parameters({path: jnp.shape(leaf) for path, leaf in located if takes_part(leaf)})


def _is_field(path: Any, x: Any, names: tuple[str, ...], shapes: Parameters) -> bool:
    """Whether an array of a state is in a field of such a name. A module may call its parameters so: they do not count."""
    if is_scale(path):
        return False
    own = owner(path, jnp.shape(x), shapes) or ()
    return any(isinstance(key, jax.tree_util.GetAttrKey) and key.name in names for key in path[: len(path) - len(own)])
