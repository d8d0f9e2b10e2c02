"""A few elements of what travels through a chain."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adam_jax._core.arithmetic import multiply, square
from adam_jax._core.configuration import applied_rates
from adam_jax._core.context import Context
from adam_jax._core.hyperparams import cast
from adam_jax._core.leaves import PyTree, as_wide, is_half, takes_part
from adam_jax._core.paths import Parameters, is_scale, owner
from adam_jax._core.spec import all_specs
from adam_jax._core.transformation import Transformation, call_update
from adam_jax.diagnostics.metrics import SampledLeaf, StepSample, Vectors, nonzero, stack_leaves
from adam_jax.stages.moments import Moments, per_leaf

LEAVES = 32
"""So many leaves of a group are looked at: a few operations for each of a thousand leaves would be
minutes of compiling."""


SLICED = 16
"""The largest stride of a slice. For larger ones a TPU's compiler copies codes, or wants more of
the chip's own memory than there is; to gather takes longer to compile."""


class Probe:
    """Follows the updates through a chain.

    And into each group inside, with a few elements of every leaf.

    The stages run on these few once more. To take them from what the stages make would be shorter;
    but XLA would then keep whole arrays for it, of directions and updates, which otherwise never
    leave the registers.

    Args:
      quota: how many elements of a leaf to take, from how many it has.
    """

    def __init__(self, quota: Callable[[int], int]) -> None:
        self.quota = quota
        self.groups: dict[str, Probe] = {}
        self.flowing: Any = None
        self.lost = False
        self.quotients: list[tuple[Any, Moments, Any, PyTree]] = []
        self.selector: Any = None
        self.whole: tuple[PyTree, PyTree, Any, Any, PyTree] = (None, None, None, None, None)

    def group(self, name: str) -> Probe:
        """The probe of a group."""
        self.groups[name] = Probe(self.quota)
        return self.groups[name]

    def follow(self, part: Any, updates: Any, state: Any, params: PyTree, context: Context) -> None:
        """Runs a stage on the elements, from the first that makes moments.

        Or stands behind groups, to the one that rounds.
        """
        begun = self.flowing is not None or bool(self.groups)
        self.selector = context.selector or self.selector
        if not isinstance(part, Transformation):
            self.lost = begun
        elif part.init.spec.stages or part.init.spec.inner or part.interface.end or self.lost:
            return
        elif begun or part.interface.gives == "moments":
            shapes = _shapes(params)
            few = functools.partial(self._few, shapes=shapes)
            taken = few(updates) if self.flowing is None else self.flowing
            gradient = None if context.gradient is None else few(context.gradient)
            inner = context._replace(gradient=gradient, probe=None)
            given, _ = call_update(part, taken, few(state), few(params), inner)
            if (
                isinstance(taken, Moments)
                and not isinstance(given, Moments)
                and not context.applied
            ):
                self.quotients.append((part, taken, few(state), given))
            self.flowing = given

    def end(self, tx: Any, gradient: PyTree, made: PyTree, before: Any, params: PyTree) -> None:
        """Looks at the whole step: the transformation, what came in, what came out.

        The state before it, the parameters.
        """
        self.whole = tx, gradient, made, before, params

    def seen(self, name: str = "all", rate: Any = None) -> dict[str, StepSample]:
        """What there is to see of all and of each group."""
        tx, gradient, made, state, params = self.whole
        rates = [its() for group, its in applied_rates(tx, state) if not group]
        rate = rates[-1] if rates else rate
        groups: dict[str, StepSample] = {}
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
            if self.selector is not None:
                taken = self.selector.takes
                updates = jax.tree.map(
                    lambda x: jnp.where(taken, x, jnp.zeros_like(x)) if takes_part(x) else x,
                    updates,
                )
            old = self._few(params, shapes)
            moved, unrounded = (
                _rows(_moved, sizes, updates, old),
                _rows(_unmoved, sizes, updates, old),
            )
        stages = [_quotient(sizes, *found) for found in self.quotients]
        quotients = [
            _applied(functools.reduce(_followed, rows), rate) for rows in zip(*stages, strict=True)
        ]
        moments = _moments_of(tx)
        held = jax.tree_util.tree_flatten_with_path(state)[0]
        few = jax.tree.leaves(self._few(state, shapes))
        codes = [
            _row(_at_ends, whole.size, some)
            for (path, whole), some in zip(held, few, strict=True)
            if _is_field(path, whole, moments, shapes) and not takes_part(whole)
        ]
        here = StepSample(
            gradient=_norm(*map(_taking_part, (gradient, self._few(gradient, shapes)))),
            moved=stack_leaves(moved),
            quotients=stack_leaves(quotients + [its.quotients for its in within]),
            unrounded=stack_leaves(unrounded),
            codes=stack_leaves(codes),
            skipped=[x for path, x in held if _is_field(path, x, ("skipped",), shapes)],
        )
        return {name: here, **groups}

    def _few(self, tree: PyTree, shapes: Parameters) -> PyTree:
        """The tree with some elements of each array that belongs to a parameter.

        At the same places in all of them.
        """
        chosen = _chosen(shapes)

        def leaf(path: Any, x: Any) -> Any:
            whole = owner(path, jnp.shape(x), shapes)
            if whole is None:
                return x
            return (
                self._take(jnp.asarray(x), shapes[whole]) if whole in chosen else jnp.asarray(x)[:0]
            )

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def _take(self, leaf: Array, shape: tuple[int, ...]) -> Array:
        """Elements from a grid as wide as the quota wants it.

        It is cut as the leaf is, over many devices too.
        """
        strides = [1] * len(shape)
        while math.prod(-(-n // s) for n, s in zip(shape, strides, strict=True)) > self.quota(
            math.prod(shape)
        ):
            longest = max(range(len(shape)), key=lambda i: shape[i] / strides[i])
            strides[longest] *= 2
        strides = [
            s if n > 1 else 1 for n, s in zip(leaf.shape, strides, strict=True)
        ]  # an axis along which ν is shared
        # From the middle of a cell: the first row of a table is often one of a kind.
        starts = [min(s // 2, max(n - 1, 0)) for n, s in zip(leaf.shape, strides, strict=True)]
        if max(strides, default=1) <= SLICED:
            return lax.slice(leaf, starts, leaf.shape, strides)
        places = jnp.ix_(
            *(
                np.arange(start, n, s)
                for start, n, s in zip(starts, leaf.shape, strides, strict=True)
            )
        )
        taken: Array = leaf.at[places].get(
            indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
        )
        return taken


def _chosen(shapes: Parameters) -> set[Any]:
    """The leaves that are looked at.

    The largest, and of those that are alike some from everywhere.
    """

    def rank(path: Any) -> tuple[int, int]:
        return -math.prod(shapes[path]), zlib.crc32(jax.tree_util.keystr(path).encode())

    return set(sorted(shapes, key=rank)[:LEAVES])


def sights(tx: Any, params: PyTree, state: Any) -> set[str]:
    """The names in `METRICS` that there is something to see of."""
    found = {"gradient_norm", "update_rms", "update_ratio"}
    stages = [spec for spec in all_specs(tx) if spec.is_stage]
    tracking = [
        spec
        for spec in stages
        if spec.interface.gives == "moments" and spec.interface.takes != "moments"
    ]
    if tracking:
        found |= {"learning_rate_median", "learning_rate_p99", "momentum_cosine"}
    moments = _moments_of(tx)
    if any(not slot.signed for spec in tracking for slot in spec.definition.slots):
        found |= {"eps_fraction", "normalized_gradient_rms", "signal_to_noise"}
    if any(map(is_half, jax.tree.leaves(params))):
        found.add("stalled_fraction")
    shapes = _shapes(params)
    for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        if not takes_part(x) and _is_field(path, x, moments, shapes):
            found.add("saturated_fraction")
        if _is_field(path, x, ("skipped",), shapes):
            found.add("skipped")
    return found


def _moments_of(tx: Any) -> tuple[str, ...]:
    """Returns the fields of all moments that the stages of a transformation keep."""
    return tuple(slot.name for spec in all_specs(tx) for slot in spec.definition.slots)


def _quotient(
    sizes: list[int], part: Any, moments: Moments, state: Any, given: PyTree
) -> list[SampledLeaf]:
    """What a stage made of moments."""
    root = part.init.spec.definition.root
    hypers = part.init.spec.definition.hyperparameters.at(
        moments.count - 1, getattr(state, "hyperparams", {})
    )
    eps, eps_root = (cast(hypers.get(name, 0.0), np.float32) for name in ("eps", "eps_root"))
    both = (moments.mu_weight, moments.mu_rate), (moments.nu_weight, moments.nu_rate)
    mu_weight, nu_weight = (
        per_leaf(_gathered(rate, moments.count) if weight is None else weight)
        for weight, rate in both
    )

    def see(grad: Array, mu: Array, direction: Array, nu: Array | None = None) -> Vectors:
        g, m, d = map(_size, (grad, mu, direction))
        v = jnp.zeros_like(g) if nu is None else jnp.broadcast_to(_single(nu), g.shape)
        size, whole = (jnp.sqrt(x) if root else x for x in (v, _single(nu_weight())))
        more = eps + (jnp.sqrt(v + eps_root) - size if root else 0)
        corrected = nonzero(size / whole)
        mean = m / _single(mu_weight())
        return {
            "gradient": g,
            "mean": mean,
            "turn": _turn(grad, mu),
            "rate": d / nonzero(m),
            "directed": _single(m != 0),
            "normalized": g / corrected,
            "signal": mean / corrected,
            "sized": _single(size != 0),
            "ruled_by_eps": jnp.where(jnp.isnan(size), size, _single(more > size)),
            "has_nu": jnp.full_like(g, nu is not None),
        }

    return _rows(
        see, sizes, moments.grad, moments.mu, given, *([] if moments.nu is None else [moments.nu])
    )


def _gathered(rate: Array, count: Array) -> Array:
    """The weight of a moment that is not corrected, which no state keeps.

    What it is if the decay has always been this one.
    """
    return -jnp.expm1(count.astype(rate.dtype) * jnp.log1p(-rate))


def _followed(first: SampledLeaf, then: SampledLeaf) -> SampledLeaf:
    """What two stages made of the same elements, as in ADOPT.

    The ν of one, and the μ of the other, in units of its root.
    """
    a, b = first.of, then.of
    made = {
        name: jnp.where(b["has_nu"] > 0, b[name], a[name])
        for name in ("normalized", "sized", "ruled_by_eps", "has_nu")
    }
    made["signal"] = jnp.where(b["has_nu"] > 0, b["signal"], b["mean"])
    return then._replace(of=b | made | {name: a[name] * b[name] for name in ("rate", "directed")})


def _applied(row: SampledLeaf, rate: Any) -> SampledLeaf:
    """Rates of elements, of which those of all are known now."""
    return row._replace(
        of=row.of | {"rate": row.of["rate"] * cast(0.0 if rate is None else rate, np.float32)}
    )


def _rows(
    see: Callable[..., Vectors | None], sizes: list[int], *trees: PyTree
) -> list[SampledLeaf]:
    """What `see` makes of the elements of each leaf.

    Of which there are so many in the whole one.
    """
    return [
        _row(see, size, *leaves)
        for size, *leaves in zip(sizes, *map(_taking_part, trees), strict=True)
    ]


def _row(see: Callable[..., Vectors | None], size: int, *leaves: Array) -> SampledLeaf:
    found = {name: x.reshape(-1) for name, x in (see(*leaves) or {}).items()}
    taken = leaves[0].size if found else 0
    return SampledLeaf(found, np.full(taken, size / max(taken, 1), np.float32))


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
    """The Euclidean norm of all leaves together.

    In one pass and in units of about the largest of some elements of theirs.

    Squares of what is larger than 1e19, or smaller than 1e-19, are no numbers of float32. The
    largest of all elements would need another pass.
    """
    top = functools.reduce(
        jnp.maximum, (jnp.max(_size(its), initial=0) for its in some), jnp.zeros((), np.float32)
    )
    top = jnp.where(jnp.isfinite(top) & (top > 0), top, 1)
    # A power of two, which rounds nothing, and the reciprocal of which is one as well.
    unit = lax.reduce_precision(
        lax.clamp(np.float32(2.0**-100), top, np.float32(2.0**100)),
        exponent_bits=8,
        mantissa_bits=0,
    )
    each = (
        jnp.sum(square(multiply(as_wide(leaf), 1 / unit))).astype(np.float32) for leaf in leaves
    )
    return unit * jnp.sqrt(sum(each, jnp.zeros((), np.float32)))


def _turn(grad: Array, mu: Array) -> Array:
    """The cosine between an element of the gradient and of its mean."""

    def parts(x: Array) -> list[Array]:
        size = nonzero(jnp.abs(x))
        return [its / size for its in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]

    return _single(
        sum(g * m for g, m in zip(parts(as_wide(grad)), parts(as_wide(mu)), strict=True))
    )


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
    """Whether an array of a state is in a field of such a name.

    A module may call its parameters so: they do not count.
    """
    if is_scale(path):
        return False
    own = owner(path, jnp.shape(x), shapes) or ()
    return any(
        isinstance(key, jax.tree_util.GetAttrKey) and key.name in names
        for key in path[: len(path) - len(own)]
    )
