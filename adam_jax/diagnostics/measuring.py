"""What a probe has sampled of a step, ready for the metrics."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adam_jax._core.arithmetic import multiply, square
from adam_jax._core.configuration import applied_rates
from adam_jax._core.hyperparams import cast
from adam_jax._core.leaves import PyTree, as_wide, is_half, takes_part
from adam_jax._core.paths import Parameters, is_scale, owner
from adam_jax._core.spec import all_specs
from adam_jax.diagnostics.metrics import SampledLeaf, StepSample, Vectors, nonzero, stack_leaves
from adam_jax.diagnostics.sampling import Probe, shapes_of
from adam_jax.stages.moments import Moments, per_leaf


def measure(probe: Probe, name: str = "all", rate: Any = None) -> dict[str, StepSample]:
    """Returns what a probe has sampled, of all leaves and of each group.

    Args:
      probe: a probe that has followed a whole step.
      name: what all leaves together are called.
      rate: the learning rate that was applied, if the transformation applies none itself.
    """
    assert probe.step is not None
    tx, gradient, made, state, params = probe.step
    rates = [its() for group, its in applied_rates(tx, state) if not group]
    rate = rates[-1] if rates else rate
    groups: dict[str, StepSample] = {}
    within = []
    for label, its in probe.groups.items():
        path = label if name == "all" else f"{name}/{label}"
        groups |= measure(its, path, rate)
        within.append(groups[path])
    shapes, held_shapes = shapes_of(params), shapes_of(params, tx, state)
    sizes = [math.prod(shape) for shape in shapes.values()]
    if within and probe.flowing is None and not probe.lost:
        moved, unrounded = [its.moved for its in within], [its.unrounded for its in within]
    else:
        updates = probe.few(made, shapes) if probe.flowing is None or probe.lost else probe.flowing
        if probe.selector is not None:
            taken = probe.selector.takes
            updates = jax.tree.map(
                lambda x: jnp.where(taken, x, jnp.zeros_like(x)) if takes_part(x) else x,
                updates,
            )
        old = probe.few(params, shapes)
        moved, unrounded = (
            _rows(_moved, sizes, updates, old),
            _rows(_unmoved, sizes, updates, old),
        )
    stages = [_quotient(sizes, *found) for found in probe.quotients]
    quotients = [
        _applied(functools.reduce(_followed, rows), rate) for rows in zip(*stages, strict=True)
    ]
    moments = _moments_of(tx)
    held = jax.tree_util.tree_flatten_with_path(state)[0]
    few = jax.tree.leaves(probe.few(state, held_shapes))
    codes = [
        _row(_at_ends, whole.size, some)
        for (path, whole), some in zip(held, few, strict=True)
        if _is_field(path, whole, moments, held_shapes) and not takes_part(whole)
    ]
    here = StepSample(
        gradient=_norm(*map(_taking_part, (gradient, probe.few(gradient, shapes)))),
        moved=stack_leaves(moved),
        quotients=stack_leaves(quotients + [its.quotients for its in within]),
        unrounded=stack_leaves(unrounded),
        codes=stack_leaves(codes),
        skipped=[x for path, x in held if _is_field(path, x, ("skipped",), held_shapes)],
    )
    return {name: here, **groups}


def sights(tx: Any, params: PyTree, state: Any) -> set[str]:
    """The names in `METRICS` that there is something to see of."""
    found = {"gradient_norm", "update_rms", "update_ratio"}
    stages = [spec for spec in all_specs(tx) if spec.is_stage]
    tracking = [spec for spec in stages if spec.interface.tracks]
    if tracking:
        found |= {"learning_rate_median", "learning_rate_p99", "momentum_cosine"}
    moments = _moments_of(tx)
    if any(not slot.signed for spec in tracking for slot in spec.definition.slots):
        found |= {"eps_fraction", "normalized_gradient_rms", "signal_to_noise"}
    if any(map(is_half, jax.tree.leaves(params))):
        found.add("stalled_fraction")
    shapes = shapes_of(params, tx, state)
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
    """Returns what `see` makes of the elements of each leaf.

    `sizes` says how many elements the whole leaves have.
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
