"""The learning rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adam_jax._core.arithmetic import multiply
from adam_jax._core.context import Context
from adam_jax._core.decorators import stage
from adam_jax._core.hyperparams import (
    Hyperparameter,
    Hyperparameters,
    ScalarOrSchedule,
    cast,
    increment,
)
from adam_jax._core.leaves import PyTree, as_wide, dtype_of, narrower_than_float32, scalar_dtype
from adam_jax._core.lift import lift, narrow
from adam_jax._core.spec import Definition

MAXIMIZE = "To maximize, negate the gradients: chain(optax.scale(-1), adam(...))."


class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`.

    Attributes:
      step: steps taken, int32, the argument of a schedule; `None` where there is no schedule.
      hyperparams: the learning rate if it is settable.
    """

    step: Array | None
    hyperparams: dict[str, Array]


@stage(takes="updates", gives="updates", rate="applies")
def scale_by_learning_rate(learning_rate: ScalarOrSchedule) -> Definition:
    """Multiplies by −learning_rate.

    What went uphill is a step downhill now, ready for `apply_updates`.

    Outside of `adam_jax.chain`, and with `params`, it rounds the update of a half-precision
    parameter to the wider of the gradient's and the parameter's dtype. Behind another stage it
    knows the gradient's only from `update(..., gradient=grads)`; without that it takes the
    parameter's.

    Args:
      learning_rate: the step size; a schedule gets the number of steps taken, 0 at the first. A
        traced scalar works without retracing and under `jax.vmap`. To maximize, chain
        `optax.scale(-1)` in front of the optimizer, so that it meets the gradients.

    Raises:
      ValueError: for a negative number, NaN or an infinity.
    """
    hypers = Hyperparameters(
        Hyperparameter("learning_rate", learning_rate, "[0, inf)", hint=MAXIMIZE)
    )

    def init(params: PyTree) -> ScaleByLearningRateState:
        return ScaleByLearningRateState(hypers.first_step(), hypers.kept(scalar_dtype(params)))

    def update(
        updates: Any, state: ScaleByLearningRateState, params: Any, context: Context
    ) -> tuple[PyTree, ScaleByLearningRateState]:
        downhill = -cast(
            hypers["learning_rate"].at(state.step, state.hyperparams), scalar_dtype(updates)
        )
        steps = lift(lambda update: multiply(as_wide(update), downhill), updates)
        if not (context.inside or context.wide) and params is not None:
            # optax.chain does not round the updates that leave it, and there this is the usual last
            # stage.
            steps = narrow(steps, _like_gradient(updates, params, context.gradient), params)
        return steps, state._replace(step=increment(state.step))

    return Definition(init, update, hyperparameters=hypers)


def _like_gradient(updates: PyTree, params: PyTree, gradient: PyTree | None) -> PyTree:
    """Returns a tree whose leaves have the dtypes of the gradients.

    A stage outside of a chain does not always know them.

    A stage in front has widened the gradient of a half-precision parameter to float32, or it was
    float32 before. The updates do not tell. It is taken to have the parameter's dtype, as gradients
    have that `jax.grad` makes.
    """
    structure: Any = jax.tree.structure(updates)
    if gradient is not None and jax.tree.structure(gradient) == structure:
        return gradient

    def leaf(update: Any, param: Any) -> Any:
        return param if dtype_of(update) == jnp.float32 and narrower_than_float32(param) else update

    return lift(leaf, updates, params=params)
