"""The end of the pipeline: weight decay and the learning rate, and the sum that Optax forms of parameter and update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._context import Context
from adam_jax._hyperparams import Hyperparameter, Hyperparameters, ScalarOrSchedule, cast, increment, peak
from adam_jax._spec import Definition
from adam_jax._transformation import stage
from adam_jax._tree import (
    PyTree,
    as_wide,
    as_wide_as,
    brief,
    dtype_of,
    expect_params,
    lift,
    narrow,
    narrower_than_float32,
    scalar_dtype,
    times,
)

Mask: TypeAlias = Literal["matrices"] | PyTree | Callable[[PyTree], PyTree]


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
    """Multiplies by −learning_rate: what went uphill is a step downhill now, ready for `apply_updates`.

    Outside of `adam_jax.chain`, and with `params`, it rounds the update of a half-precision parameter to the wider of the
    gradient's and the parameter's dtype. Behind another stage it knows the gradient's only from `update(..., gradient=grads)`;
    without that it takes the parameter's.

    Args:
      learning_rate: the step size; a schedule gets the number of steps taken, 0 at the first. A traced scalar works without
        retracing and under `jax.vmap`. A negative one ascends.

    Raises:
      ValueError: for NaN or an infinity.
    """
    hypers = Hyperparameters(Hyperparameter("learning_rate", learning_rate))

    def init(params: PyTree) -> ScaleByLearningRateState:
        return ScaleByLearningRateState(hypers.first_step(), hypers.kept(scalar_dtype(params)))

    def update(
        updates: Any, state: ScaleByLearningRateState, params: Any, context: Context
    ) -> tuple[PyTree, ScaleByLearningRateState]:
        downhill = -cast(hypers["learning_rate"].at(state.step, state.hyperparams), scalar_dtype(updates))
        steps = lift(lambda update: times(as_wide(update), downhill), updates)
        if not context.inside and params is not None:
            # optax.chain does not round the updates that leave it, and there this is the usual last stage.
            steps = narrow(steps, _like_gradient(updates, params, context.gradient), params)
        return steps, state._replace(step=increment(state.step))

    return Definition(init, update, hyperparameters=hypers)


def _like_gradient(updates: PyTree, params: PyTree, gradient: PyTree | None) -> PyTree:
    """Returns a tree whose leaves have the dtypes of the gradients, as far as a stage outside of a chain can know them.

    A stage in front has widened the gradient of a half-precision parameter to float32, or it was float32 before. The updates do
    not tell. It is taken to have the parameter's dtype, as gradients have that `jax.grad` makes.
    """
    structure: Any = jax.tree.structure(updates)
    if gradient is not None and jax.tree.structure(gradient) == structure:
        return gradient

    def leaf(update: Any, param: Any) -> Any:
        return param if dtype_of(update) == jnp.float32 and narrower_than_float32(param) else update

    return lift(leaf, updates, params=params)


class AddDecayedWeightsState(NamedTuple):
    """State of `add_decayed_weights`.

    Attributes:
      step: steps taken, int32; `None` where there is no schedule.
      hyperparams: the weight decay, and the learning rate that it follows, if they are settable.
    """

    step: Array | None
    hyperparams: dict[str, Array]


def _rate(weight_decay: Any, mask: Any, learning_rate: Any) -> str:
    return "before" if learning_rate is None else "after"


@stage(takes="updates", gives="updates", rate=_rate)
def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    *,
    learning_rate: ScalarOrSchedule | None = None,
) -> Definition:
    """Lets parameters decay towards zero.

        update ← update + weight_decay·params                                        before the learning rate
        update ← update − weight_decay·(learning_rate / its peak)·params             after it

    Args:
      weight_decay: ≥ 0.
      mask: which leaves decay: a tree of booleans with the structure of the parameters or a prefix of it, a function of the
        parameters that returns one, or "matrices" for leaves of two or more dimensions. `None`: all.
      learning_rate: `None` for a decay that the learning rate will multiply. The learning rate itself (a number or a
        schedule) for one that it does not: the stage then stands after it, and follows only the schedule's course relative
        to its peak, which is looked for once, when the stage is made.

    Raises:
      ValueError: for a negative or NaN decay, an unknown mask, and, in `update`, without `params` or with a mask that does
        not fit.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019), Algorithm 2.
    """
    hypers = Hyperparameters(Hyperparameter("weight_decay", weight_decay, "[0, inf)"))
    if isinstance(mask, str) and mask != "matrices":
        raise ValueError(
            f"mask: found {brief(mask)}; expected 'matrices', a tree of booleans, a function that returns one, or None."
        )
    course = Hyperparameter("learning_rate", 1.0 if learning_rate is None else learning_rate)
    highest = peak(course.first if course.settable else course.value)
    follows = course.scheduled or course.settable
    read = Hyperparameters(*hypers.values(), *([course] if follows else []))

    def init(params: PyTree) -> AddDecayedWeightsState:
        return AddDecayedWeightsState(read.first_step(), read.kept(scalar_dtype(params)))

    def update(
        updates: Any, state: AddDecayedWeightsState, params: Any, context: Context
    ) -> tuple[PyTree, AddDecayedWeightsState]:
        params = expect_params(params, "add_decayed_weights()")
        scalars = scalar_dtype(params)
        values = read.at(state.step, state.hyperparams)
        factor = cast(values["weight_decay"], scalars)
        if learning_rate is not None:
            factor = -factor * (cast(values["learning_rate"], scalars) / cast(highest, scalars) if follows else 1)

        def leaf(update: Any, param: Any, decays: bool) -> Array:
            if isinstance(weight_decay, (int, float)) and weight_decay == 0:
                return as_wide(update)  # spares the reading of every parameter
            wide = as_wide(as_wide_as(update, param))
            return wide + times(as_wide(as_wide_as(param, update)), factor) if decays else wide

        updates = lift(leaf, updates, params=params, mask=decaying(mask, params))
        return updates, state._replace(step=increment(state.step))

    return Definition(init, update, hyperparameters=hypers)


def _flag(decays: Any) -> bool:
    if not isinstance(decays, (bool, np.bool_)) and decays not in (0, 1):
        raise TypeError(f"found {decays!r}")
    return bool(decays)


def decaying(mask: Mask | None, params: PyTree) -> PyTree:
    """A tree of booleans shaped like the parameters."""
    if mask is None:
        return jax.tree.map(lambda p: True, params)
    if isinstance(mask, str):
        return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)
    tree = mask(params) if callable(mask) else mask
    try:
        return jax.tree.map(lambda decays, part: jax.tree.map(lambda p: _flag(decays), part), tree, params)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"mask: found {brief(tree)}; expected True or False in the structure of the parameters, "
            f"{jax.tree.structure(params)}, or in a prefix of it."
        ) from error
