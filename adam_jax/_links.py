"""Links that fit any member of the family, and what is read from their states."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._context import Context
from adam_jax._hyperparams import Hyperparameter, Hyperparameters, ScalarOrSchedule, cast, complement, increment
from adam_jax._moments import Moments, expect_moments, grow
from adam_jax._spec import Definition, Init, Update
from adam_jax._sums import mean, norm
from adam_jax._transformation import stage, stateless
from adam_jax._tree import (
    PyTree,
    as_wide,
    as_wide_as,
    dtype_of,
    expect_params,
    finfo,
    leaving_dtype,
    lerp,
    lift,
    like_params,
    nodes,
    over,
    scalar_dtype,
    times,
    wide_dtype,
    widen,
)


@stage(takes="updates", gives="updates")
def cautious(*, after_learning_rate: bool | None = None) -> tuple[Init, Update]:
    """Takes only those elements of the update that this step's gradient agrees with, and makes up for the rest.

        agrees = update·gradient < 0                 (> 0 before the learning rate)
        update ← update·agrees / max(mean(agrees), 1e-3)

    The mean is over a leaf. Fits behind a finished member, `chain(adamw(1e-3), cautious())`, where it judges the whole step;
    the paper's place is before weight decay: `chain(track_moments(), correct_bias(), scale_by_moments(), cautious(),
    add_decayed_weights(0.01), scale_by_learning_rate(1e-3))`.

    Args:
      after_learning_rate: on which side of the learning rate it stands, which decides the sign. `None`: the chain knows.
        Has to be said behind a transformation of Optax, and outside of `adam_jax.chain`, where the gradient has to be
        passed as well: `update(grads, state, params, gradient=grads)`.

    Raises:
      ValueError: in `update`, where the side or the gradient is not known.

    Source: Liang et al., "Cautious Optimizers: Improving Training with One Line of Code" (2024), Algorithm 1; the factor is
    that of the authors' later code, which is 1 where all elements agree (the paper's has numel + 1 below).
    """

    def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[PyTree, Any]:
        after = context.applied if after_learning_rate is None else after_learning_rate
        if context.gradient is None or after is None:
            lacks = "the gradient" if context.gradient is None else "whether the learning rate is already in the updates"
            raise ValueError(
                f"cautious() does not know {lacks}. Put it into adam_jax.chain, or say cautious(after_learning_rate=True) and "
                f"pass the gradient: update(grads, state, params, gradient=grads)."
            )

        def leaf(update: Any, grad: Any) -> Array:
            update, g = as_wide(as_wide_as(update, grad)), as_wide(as_wide_as(grad, update))
            # Of the signs, where there are any: the product of two small numbers is 0.
            along = update.real * g.real + update.imag * g.imag if jnp.iscomplexobj(g) else jnp.sign(update) * jnp.sign(g)
            agrees = (along < 0 if after else along > 0).astype(along.dtype)
            return times(update, agrees / jnp.maximum(mean(agrees), 1e-3))

        return lift(leaf, updates, gradient=context.gradient), state

    return stateless, update


class ClipUpdateRmsState(NamedTuple):
    """State of `clip_update_rms`.

    Attributes:
      step: steps taken, int32; `None` where there is no schedule.
      hyperparams: the threshold if it is settable.
    """

    step: Array | None
    hyperparams: dict[str, Array]


@stage(takes="any", gives="same")
def clip_update_rms(threshold: ScalarOrSchedule = 1.0) -> Definition:
    """Shortens a leaf's update where its root mean square is above the threshold.

        update ← update / max(1, rms/threshold)

    Among Moments, between `correct_bias()` and `scale_by_moments()`, rms is that of g/√ν: it is large when ν is out of date,
    which announces a loss spike, and the link makes StableAdamW. Among plain updates rms is the update's own, as in
    Adafactor; behind the learning rate the threshold is in units of it, so `chain(radam(1e-3), clip_update_rms())` means the
    same as the link before the rate. (Outside of `adam_jax.chain` it has to stand before it.)

    Args:
      threshold: > 0, in units of the learning rate.

    Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language models" (2023),
    Algorithm 2; Shazeer & Stern, "Adafactor" (2018), §6.
    """
    hypers = Hyperparameters(Hyperparameter("threshold", threshold, "(0, inf)"))

    def init(params: PyTree) -> ClipUpdateRmsState:
        return ClipUpdateRmsState(hypers.first_step(), hypers.kept(scalar_dtype(params)))

    def update(updates: Any, state: ClipUpdateRmsState, params: Any, context: Context) -> tuple[Any, ClipUpdateRmsState]:
        scalars = scalar_dtype(updates.mu if isinstance(updates, Moments) else updates)
        most = cast(hypers["threshold"].at(state.step, state.hyperparams), scalars)
        if context.learning_rate is not None:
            most = most * jnp.abs(cast(context.learning_rate(), scalars))

        def rms(x: Array) -> Array:
            return norm(x) * np.asarray(max(x.size, 1) ** -0.5, finfo(x.dtype).dtype)  # squares of huge updates overflow

        def shortened(x: Array, size: Array) -> Array:
            limit = most.astype(size.dtype)
            above = size > limit
            # One by one: their quotient may be subnormal.
            return times(over(x, jnp.where(above, size, 1)), jnp.where(above, limit, 1))

        def moment(grad: Any, mu: Array, nu: Array) -> Array:
            root = jnp.sqrt(jnp.maximum(nu, finfo(nu.dtype).tiny))
            return shortened(mu, rms(over(widen(grad), jnp.broadcast_to(root, mu.shape))))

        def plain(update: Any) -> Array:
            return shortened(as_wide(update), rms(as_wide(update)))

        unknown = context.applied is None or (context.applied and context.learning_rate is None)
        if not isinstance(updates, Moments) and context.inside and unknown:
            raise ValueError(
                "clip_update_rms() does not know the one learning rate that was applied before it: a transformation of others "
                "may have, or groups with rates of their own. Its threshold is in units of that. Put it before the learning rate."
            )
        if isinstance(updates, Moments):
            expect_moments(updates, "clip_update_rms()", needs_nu=True)
            updates = updates._replace(mu=lift(moment, updates.grad, free=("nu",), mu=updates.mu, nu=updates.nu))
        else:
            updates = lift(plain, updates)
        return updates, state._replace(step=increment(state.step))

    return Definition(init, update, hyperparameters=hypers)


class AverageParametersState(NamedTuple):
    """State of `average_parameters`.

    Attributes:
      step: steps taken, int32; `None` where the decay is no schedule.
      average: the averaged parameters, float32 or wider, corrected for their bias; before the first step the initial ones.
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

    The average is kept in its corrected form, so it can be read, by `averaged_parameters`, with no division; after the first
    step it is the parameters, after a few their mean.

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
            # A copy, even where the dtype is the same: a donated step must not be given one buffer twice.
            average=like_params(lambda p: jnp.array(p, wide_dtype(p), copy=True), params),
            average_weight=jnp.zeros(2, scalars),
            hyperparams=hypers.kept(scalars),
        )

    def update(updates: Any, state: AverageParametersState, params: Any, context: Context) -> tuple[Any, AverageParametersState]:
        params = expect_params(params, "average_parameters()")
        scalars = state.average_weight.dtype
        rate = complement(hypers["decay"].at(state.step, state.hyperparams), scalars)
        weight = grow(state.average_weight, rate)
        share = rate / weight[0]

        def leaf(update: Any, param: Any, average: Array, incoming: Any) -> tuple[Any, Array]:
            # What the caller will hold: a chain rounds the update as it leaves, and the caller rounds the sum.
            as_it_is = context.rounded or incoming is None
            step = as_wide(update if as_it_is else update.astype(leaving_dtype(incoming, param)))
            moved = as_wide(as_wide_as(param, step)) + as_wide_as(step, param)
            return update, lerp(average, as_wide(moved.astype(dtype_of(param))), share)

        _, average = lift(leaf, updates, outputs=2, params=params, average=state.average, incoming=context.incoming)
        return updates, state._replace(step=increment(state.step), average=average, average_weight=weight)

    return Definition(init, update, hyperparameters=hypers, trees={"average": "other"})


def averaged_parameters(state: Any) -> PyTree:
    """The averaged parameters, from the state of any transformation that holds an `average_parameters`.

    Returns:
      A tree shaped like the parameters, float32 or wider; integer leaves, which have no average, are `None`.

    Raises:
      ValueError: if the state holds no such average, or several.
    """
    found = [node.average for node in nodes(state, AverageParametersState)]
    if len(found) != 1:
        raise ValueError(
            f"averaged_parameters: found {len(found)} averages in the state; expected one. End the chain with "
            f"average_parameters(decay), and pass that chain's state, or one group's part of it."
        )
    return found[0]
