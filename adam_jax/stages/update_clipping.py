"""`clip_update_rms`: limits the size of each leaf's update."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._core.arithmetic import divide, multiply, widen
from adam_jax._core.context import Context
from adam_jax._core.decorators import stage
from adam_jax._core.hyperparams import (
    Hyperparameter,
    Hyperparameters,
    ScalarOrSchedule,
    cast,
    increment,
)
from adam_jax._core.leaves import PyTree, as_wide, finfo, scalar_dtype
from adam_jax._core.lift import lift
from adam_jax._core.spec import Definition
from adam_jax._core.sums import norm
from adam_jax.stages.moments import Moments, expect_moments


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

    Among Moments, between `correct_bias()` and `scale_by_moments()`, rms is that of g/√ν: it is
    large when ν is out of date, which announces a loss spike, and the link makes StableAdamW. Among
    plain updates rms is the update's own, as in Adafactor; behind the learning rate the threshold
    is in units of it, so `chain(radam(1e-3), clip_update_rms())` means the same as the link before
    the rate. (Outside of `adam_jax.chain` it has to stand before it.)

    Args:
      threshold: > 0, in units of the learning rate.

    Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language
    models" (2023), Algorithm 2; Shazeer & Stern, "Adafactor" (2018), §6.
    """
    hypers = Hyperparameters(Hyperparameter("threshold", threshold, "(0, inf)"))

    def init(params: PyTree) -> ClipUpdateRmsState:
        return ClipUpdateRmsState(hypers.first_step(), hypers.kept(scalar_dtype(params)))

    def update(
        updates: Any, state: ClipUpdateRmsState, params: Any, context: Context
    ) -> tuple[Any, ClipUpdateRmsState]:
        scalars = scalar_dtype(updates.mu if isinstance(updates, Moments) else updates)
        most = cast(hypers["threshold"].at(state.step, state.hyperparams), scalars)
        if context.learning_rate is not None:
            most = most * jnp.abs(cast(context.learning_rate(), scalars))

        def rms(x: Array) -> Array:
            return norm(x) * np.asarray(
                max(x.size, 1) ** -0.5, finfo(x.dtype).dtype
            )  # squares of huge updates overflow

        def shortened(x: Array, size: Array) -> Array:
            limit = most.astype(size.dtype)
            above = size > limit
            # One by one: their quotient may be subnormal.
            return multiply(divide(x, jnp.where(above, size, 1)), jnp.where(above, limit, 1))

        def moment(grad: Any, mu: Array, nu: Array) -> Array:
            root = jnp.sqrt(jnp.maximum(nu, finfo(nu.dtype).tiny))
            return shortened(mu, rms(divide(widen(grad), jnp.broadcast_to(root, mu.shape))))

        def plain(update: Any) -> Array:
            return shortened(as_wide(update), rms(as_wide(update)))

        unknown = context.applied is None or (context.applied and context.learning_rate is None)
        if not isinstance(updates, Moments) and context.inside and unknown:
            raise ValueError(
                "clip_update_rms() does not know the one learning rate that was applied before "
                "it: a transformation of others may have, or groups with rates of their own. Its "
                "threshold is in units of that. Put it before the learning rate."
            )
        if isinstance(updates, Moments):
            expect_moments(updates, "clip_update_rms()", needs_nu=True)
            updates = updates._replace(
                mu=lift(moment, updates.grad, free=("nu",), mu=updates.mu, nu=updates.nu)
            )
        else:
            updates = lift(plain, updates)
        return updates, state._replace(step=increment(state.step))

    return Definition(init, update, hyperparameters=hypers)
