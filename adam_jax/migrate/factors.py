"""The debias factors of moments that a state has, or that its count gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._core.configuration import StageInstance, gathering
from adam_jax._core.hyperparams import complement
from adam_jax._core.leaves import scalar_dtype
from adam_jax.stages.moments import accumulate_weight


def factor_of(stage: StageInstance, field: str, row: int) -> Array:
    """Returns the debias factor of a leaf's moment, as two floats.

    If the state does not keep it, the count gives it.
    """
    columns, factors = gathering(stage.tx), stage.state.weights
    if field in columns:
        kept: Array = factors[:, columns.index(field)]
        return kept if factors.ndim == 2 else kept[:, row]
    count, none = stage.state.count, jnp.zeros(2, scalars_of(stage))
    if is_whole(stage, field):
        # Before the first step it has none, like every other moment. After `reset` of some leaves
        # the other moment says so.
        begun = count
        if columns:
            begun = factors[0, 0] if factors.ndim == 2 else factors[0, 0, row]
        whole: Array = jnp.stack([(begun > 0).astype(none.dtype), none[1]])
        return whole

    def step(i: Any, factor: Array) -> Array:
        return accumulate_weight(factor, rate_of(stage, field, jnp.asarray(i, jnp.int32)))

    gathered: Array = jax.lax.fori_loop(0, count, step, none)
    return gathered


def rate_of(stage: StageInstance, field: str, count: Array) -> Array:
    """Returns 1 − the decay of a moment, at the step before which `count` were taken."""
    name = stage.slots[field].decay
    assert stage.definition is not None
    assert name is not None
    decay = stage.definition.hyperparameters[name].at(count, stage.state.hyperparams)
    return complement(decay, scalars_of(stage))


def is_whole(stage: StageInstance, field: str) -> bool:
    """Whether a moment has a debias factor of 1 from its first step on.

    A sum, a maximum, and a gradient that is not averaged have it.
    """
    slot = stage.slots.get(field)
    return slot is None or slot.whole


def scalars_of(stage: StageInstance) -> Any:
    """Returns the dtype of a stage's scalars."""
    factors = getattr(stage.state, "weights", None)
    return scalar_dtype(stage.state) if factors is None else factors.dtype


def together(values: Sequence[Array], none: Array) -> Array:
    """Returns the one value that all leaves have, or an entry per leaf.

    Args:
      values: one for each leaf. Leaves that have one value in common should have the same array:
        values of tracers cannot be compared.
      none: what is returned where there are no leaves.
    """
    first = values[0] if values else none

    def same(value: Array) -> bool:
        known = not isinstance(value, jax.core.Tracer) and not isinstance(first, jax.core.Tracer)
        return value is first or (known and np.array_equal(value, first))

    return (first if all(map(same, values)) else jnp.stack(values, axis=-1)).astype(none.dtype)


def spread(value: Array, ndim: int, leaves: tuple[int, ...]) -> Array:
    """Returns a value of `ndim` dimensions with an entry per leaf, if `leaves` is not empty."""
    value = value[..., None] if leaves and value.ndim == ndim else value
    return jnp.broadcast_to(value, value.shape[:ndim] + leaves)
