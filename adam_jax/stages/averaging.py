"""Averages of the parameters over the steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from adam_jax._core.arithmetic import lerp
from adam_jax._core.context import Context
from adam_jax._core.decorators import stage
from adam_jax._core.errors import expect_params
from adam_jax._core.hyperparams import (
    Hyperparameter,
    Hyperparameters,
    ScalarOrSchedule,
    complement,
    increment,
)
from adam_jax._core.leaves import (
    PyTree,
    as_wide,
    as_wide_as,
    dtype_of,
    find_nodes,
    full_beside,
    is_shape,
    leaving_dtype,
    like_params,
    scalar_dtype,
    wide_dtype,
)
from adam_jax._core.lift import lift
from adam_jax._core.spec import Definition
from adam_jax.stages.moments import accumulate_weight


class AverageParametersState(NamedTuple):
    """State of `average_parameters`.

    Attributes:
      step: steps taken, int32; `None` where the decay is no schedule.
      average: the averaged parameters, float32 or wider, corrected for their bias; before the first
        step the initial ones.
      average_weight: the weight that the average has gathered, as the sum of two floats.
      hyperparams: the decay if it is settable.
    """

    step: Array | None
    average: PyTree
    average_weight: Array
    hyperparams: dict[str, Array]


@stage(takes="updates", gives="updates", rate="after", end="reads")
def average_parameters(decay: ScalarOrSchedule) -> Definition:
    """Averages the parameters, and leaves the updates as they are. Comes last.

        weight ← weight + (1 − decay)·(1 − weight)
        average ← average + (1 − decay)/weight·(params + update − average)

    The average is kept in its corrected form, so it can be read, by `averaged_parameters`, with no
    division; after the first step it is the parameters, after a few their mean. Before the first
    step it is what `init` got: the parameters, or zeros where it got shapes.

    Args:
      decay: in [0, 1).

    Raises:
      ValueError: in `update`, without `params`.

    Source: Kingma & Ba (2015), §7.2.
    """
    hypers = Hyperparameters(Hyperparameter("decay", decay, "[0, 1)"))

    def init(params: PyTree) -> AverageParametersState:
        scalars = scalar_dtype(params)
        return AverageParametersState(
            step=hypers.first_step(),
            average=like_params(_first_average, params),
            average_weight=jnp.zeros(2, scalars),
            hyperparams=hypers.kept(scalars),
        )

    def update(
        updates: Any, state: AverageParametersState, params: Any, context: Context
    ) -> tuple[Any, AverageParametersState]:
        params = expect_params(params, "average_parameters()")
        scalars = state.average_weight.dtype
        rate = complement(hypers["decay"].at(state.step, state.hyperparams), scalars)
        weight = accumulate_weight(state.average_weight, rate)
        share = rate / weight[0]

        def leaf(update: Any, param: Any, average: Array, incoming: Any) -> tuple[Any, Array]:
            # What the caller will hold: a chain rounds the update as it leaves, and the caller
            # rounds the sum.
            as_it_is = context.rounded or incoming is None
            step = as_wide(update if as_it_is else update.astype(leaving_dtype(incoming, param)))
            moved = as_wide(as_wide_as(param, step)) + as_wide_as(step, param)
            return update, lerp(average, as_wide(moved.astype(dtype_of(param))), share)

        _, average = lift(
            leaf,
            updates,
            outputs=2,
            params=params,
            average=state.average,
            incoming=context.incoming,
        )
        return updates, state._replace(
            step=increment(state.step), average=average, average_weight=weight
        )

    return Definition(init, update, hyperparameters=hypers, trees={"average": "other"})


def _first_average(param: Any) -> Array:
    """The parameter, or zeros in place of a shape: the first step gives them no weight."""
    if is_shape(param):
        return full_beside(param, 0, wide_dtype(param))
    # A copy, even where the dtype is the same: a donated step must not be given one buffer twice.
    return jnp.array(param, wide_dtype(param), copy=True)


def averaged_parameters(state: Any) -> PyTree:
    """The averaged parameters.

    From the state of any transformation that holds an `average_parameters`.

    Returns:
      A tree shaped like the parameters, float32 or wider; integer leaves, which have no average,
      are `None`.

    Raises:
      ValueError: if the state holds no such average, or several.
    """
    found = [node.average for node in find_nodes(state, AverageParametersState)]
    if len(found) != 1:
        raise ValueError(
            f"averaged_parameters: found {len(found)} averages in the state; expected one. End the "
            "chain with average_parameters(decay), and pass that chain's state, or one group's "
            "part of it."
        )
    return found[0]
