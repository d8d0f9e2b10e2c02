"""`clip_global_norm`: limits the norm of all gradients together."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from adam_jax._core.arithmetic import multiply, sqrt
from adam_jax._core.context import Context
from adam_jax._core.decorators import stage
from adam_jax._core.hyperparams import (
    Hyperparameter,
    Hyperparameters,
    ScalarOrSchedule,
    cast,
    increment,
)
from adam_jax._core.leaves import PyTree, as_wide, scalar_dtype
from adam_jax._core.lift import lift
from adam_jax._core.spec import Definition
from adam_jax._core.sums import all_reduce, cut_axes, sums_of_squares


class ClipGlobalNormState(NamedTuple):
    """State of `clip_global_norm`.

    Attributes:
      step: steps taken, int32; `None` where there is no schedule.
      hyperparams: the limit if it is settable.
    """

    step: Array | None
    hyperparams: dict[str, Array]


@stage(takes="updates", gives="updates")
def clip_global_norm(limit: ScalarOrSchedule) -> Definition:
    """Shortens the gradients where the norm of all of them together is the limit or more.

        tx = chain(stages.clip_global_norm(1.0), adamw(1e-3))

        g ← g · limit/‖g‖          where ‖g‖ ≥ limit, else unchanged

    The norm is the Euclidean one of all leaves that reach the stage: in front of `by_path` of all
    groups, frozen ones too, inside a group of its leaves. It is summed in float32 (float64 where a
    leaf is), so its last digits depend on the mesh. One scalar is handed on, and the product is
    formed where the moments read the gradient: the stage reads gradients once and writes none.

    A norm above 1.8e19 is infinite in float32. The gradients then count as zero, but elements that
    are infinite become NaN, and a NaN makes all of them NaN: guard the chain by `skip_nonfinite`.

    Inside `jax.shard_map` each leaf is summed along the axes along which it is cut, for which
    `manual_axes` has to say that they are shared.

    Args:
      limit: > 0.

    Raises:
      ValueError: for a limit that is not above 0; in `update`, inside `jax.shard_map` with
        check_vma=False or `jax.pmap`, where JAX does not know which leaves are cut.

    Source: Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks"
    (2013), Algorithm 1.

    Others: `optax.clip_by_global_norm` has the same rule. It divides each element by ‖g‖ and
    multiplies it by the limit, which rounds twice, in the gradient's dtype.
    """
    hypers = Hyperparameters(Hyperparameter("limit", limit, "(0, inf)"))

    def init(params: PyTree) -> ClipGlobalNormState:
        return ClipGlobalNormState(hypers.first_step(), hypers.kept(scalar_dtype(params)))

    def update(
        updates: Any, state: ClipGlobalNormState, params: Any, context: Context
    ) -> tuple[PyTree, ClipGlobalNormState]:
        scalars = scalar_dtype(updates)
        most = cast(hypers["limit"].at(state.step, state.hyperparams), scalars)
        size = global_norm(updates, "clip_global_norm")
        one, short = jnp.ones((), scalars), size < most  # which a NaN is not: it is not hidden
        factor = jnp.where(short, one, most / jnp.where(short, one, size))
        updates = lift(lambda update: multiply(as_wide(update), factor), updates)
        return updates, state._replace(step=increment(state.step))

    return Definition(init, update, hyperparameters=hypers)


def global_norm(tree: PyTree, caller: str) -> Array:
    """The Euclidean norm of all leaves that take part, infinite where it overflows.

    Args:
      tree: arrays.
      caller: the stage, for errors.
    """
    own = sums_of_squares(tree)
    whole = [all_reduce(total, lax.psum, cut_axes(total, caller)) for total in own]
    return sqrt(functools.reduce(jnp.add, whole, jnp.zeros((), scalar_dtype(tree))))
