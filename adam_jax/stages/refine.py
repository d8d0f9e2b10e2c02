"""Stages between tracking and scaling that give a member its second memory.

A maximum, a slow mean, a variance.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from adam_jax._core.arithmetic import make_ema, multiply, square, widen
from adam_jax._core.context import Context
from adam_jax._core.decorators import stage, stateless
from adam_jax._core.hyperparams import (
    Hyperparameter,
    Hyperparameters,
    ScalarOrSchedule,
    cast,
    complement,
    increment,
)
from adam_jax._core.leaves import PyTree, scalar_dtype
from adam_jax._core.lift import lift
from adam_jax._core.spec import Definition, Init, Update
from adam_jax.stages.moments import Moments, expect_moments
from adam_jax.storage.formats import Storage, canonical, resolve_storage
from adam_jax.storage.random_bits import StepBits
from adam_jax.storage.slot import MomentSlot


class KeepMaximumState(NamedTuple):
    """State of `keep_maximum`.

    Attributes:
      nu_max: the largest ν so far of each element, as it is stored.
      scales: as in the states of `track_moments`.
    """

    nu_max: PyTree
    scales: dict[str, Array]


@stage(takes="moments", gives="moments", canonical={"storage": canonical})
def keep_maximum(*, storage: Storage = "float32", nu_dtype: Any = None) -> Definition:
    """Replaces ν by the largest it has been.

        nu_max ← max(nu_max, nu)

    Behind `correct_bias()` it is the maximum of corrected moments (Optax); before it, of raw ones,
    corrected by the present weight (PyTorch). The paper corrects nothing.

    Args:
      storage: how the maximum rests, as in `track_moments`; of a pair, as ν does.
      nu_dtype: as in `track_moments`.

    Source: Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond" (2018), Algorithm 2.
    """
    slot = MomentSlot(
        "nu_max",
        resolve_storage(storage, None, nu_dtype)[1],
        signed=False,
        meaning="the maximum of {nu}",
        label="largest ν",
    )

    def init(params: PyTree) -> KeepMaximumState:
        nu_max = slot.init(params)
        return KeepMaximumState(nu_max, slot.first_scales(nu_max))

    def update(
        updates: Any, state: KeepMaximumState, params: Any, context: Context
    ) -> tuple[Moments, KeepMaximumState]:
        moments = expect_moments(updates, "keep_maximum()", needs_nu=True)

        def leaf(grad: Any, nu: Array, nu_max: Array) -> Array:
            return jnp.maximum(nu, nu_max.astype(nu.dtype))

        before = slot.widen(state.nu_max, state.scales)
        nu_max = lift(leaf, moments.grad, free=("nu",), nu=moments.nu, nu_max=before)
        kept, scales = slot.narrow(
            nu_max,
            state.nu_max,
            state.scales,
            StepBits(context.stream("keep_maximum"), moments.count),
            context.selector,
        )
        return moments._replace(nu=nu_max), KeepMaximumState(kept, scales)

    return Definition(init, update, (slot,), counter=None)


class MixSlowMeanState(NamedTuple):
    """State of `mix_slow_mean`.

    Attributes:
      step: steps taken, int32; `None` where there is no schedule.
      mu_slow: the slow first moment as it is stored.
      hyperparams: b3 and alpha if they are settable.
      scales: as in the states of `track_moments`.
    """

    step: Array | None
    mu_slow: PyTree
    hyperparams: dict[str, Array]
    scales: dict[str, Array]


@stage(takes="moments", gives="moments", canonical={"storage": canonical})
def mix_slow_mean(
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 5.0,
    *,
    mu_dtype: Any = None,
    storage: Storage = "float32",
) -> Definition:
    """Adds a second, slow first moment, which is not corrected for its bias.

        mu_slow ← mu_slow + (1 − b3)·(g − mu_slow)
        mu ← mu + alpha·mu_slow

    Args:
      b3: decay of the slow moment, in [0, 1).
      alpha: its share, ≥ 0.
      mu_dtype: as in `track_moments`.
      storage: how the slow moment rests, as in `track_moments`; of a pair, as μ does.

    Source: Pagliardini, Ablin & Grangier, "The AdEMAMix Optimizer" (2024), §3.
    """
    hypers = Hyperparameters(
        Hyperparameter("b3", b3, "[0, 1)"), Hyperparameter("alpha", alpha, "[0, inf)")
    )
    slot = MomentSlot(
        "mu_slow",
        resolve_storage(storage, mu_dtype)[0],
        meaning="the slow mean of {}",
        decay="b3",
        label="slow μ",
    )

    def init(params: PyTree) -> MixSlowMeanState:
        slow = slot.init(params)
        return MixSlowMeanState(
            hypers.first_step(), slow, hypers.kept(scalar_dtype(params)), slot.first_scales(slow)
        )

    def update(
        updates: Any, state: MixSlowMeanState, params: Any, context: Context
    ) -> tuple[Moments, MixSlowMeanState]:
        moments = expect_moments(updates, "mix_slow_mean()")
        scalars = scalar_dtype(moments.mu)
        values = hypers.at(state.step, state.hyperparams)
        used = {name: cast(value, scalars) for name, value in values.items()}
        average = make_ema(values["b3"], used["b3"], complement(values["b3"], scalars))

        def leaf(grad: Any, mu: Array, mu_slow: Array) -> tuple[Array, Array]:
            slow = average(mu_slow.astype(mu.dtype), widen(grad))
            return mu + multiply(slow, used["alpha"]), slow

        before = slot.widen(state.mu_slow, state.scales)
        mu, slow = lift(leaf, moments.grad, outputs=2, mu=moments.mu, mu_slow=before)
        kept, scales = slot.narrow(
            slow,
            state.mu_slow,
            state.scales,
            StepBits(context.stream("mix_slow_mean"), moments.count),
            context.selector,
        )
        return moments._replace(mu=mu), MixSlowMeanState(
            increment(state.step), kept, state.hyperparams, scales
        )

    return Definition(init, update, (slot,), hypers)


@stage(takes="moments", gives="moments")
def center() -> tuple[Init, Update]:
    """Makes of ν the variance, and of μ the gradient again.

        nu ← max(nu − |mu|², 0)          mu ← g

    The maximum, which other frameworks leave out, keeps a rounding error below zero from becoming
    NaN.

    Source: Graves, "Generating Sequences With Recurrent Neural Networks" (2013), §4.2, equations 38
    to 45.
    """

    def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[Moments, Any]:
        moments = expect_moments(updates, "center()", needs_nu=True)

        def leaf(grad: Any, mu: Array, nu: Array) -> tuple[Array, Array]:
            return widen(grad), jnp.maximum(nu - square(mu), 0)

        mu, nu = lift(leaf, moments.grad, outputs=2, free=("nu",), mu=moments.mu, nu=moments.nu)
        return moments._replace(mu=mu, nu=nu, mu_weight=jnp.ones_like(moments.mu_rate)), state

    return stateless, update
