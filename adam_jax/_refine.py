"""Stages between tracking and scaling that give a member its second memory: a maximum, a slow mean, a variance."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from adam_jax import storage as forms
from adam_jax._hyperparams import Hyperparameter, ScalarOrSchedule, cast, complement, first_values, increment
from adam_jax._moments import Moments, Storage, expect_moments
from adam_jax._transformation import Context, Init, Update, stage, stateless
from adam_jax._tree import (
    PyTree,
    averaging,
    lift,
    like_params,
    real_dtype,
    scalar_dtype,
    square,
    times,
    wide_dtype,
    widen,
)


class KeepMaximumState(NamedTuple):
    """State of `keep_maximum`.

    Attributes:
      nu_max: the largest ν so far, of each element, at rest.
      scales: as in `TrackMomentsState`.
    """

    nu_max: PyTree
    scales: dict[str, Array]


@stage(takes="moments", gives="moments")
def keep_maximum(*, storage: Storage = "float32", nu_dtype: Any = None) -> tuple[Init, Update]:
    """Replaces ν by the largest it has been.

        nu_max ← max(nu_max, nu)

    Behind `correct_bias()` it is the maximum of corrected moments (Optax); before it, of raw ones, corrected by the present
    weight (PyTorch). The paper corrects nothing.

    Args:
      storage: how the maximum rests, as in `track_moments`; of a pair, as ν does.
      nu_dtype: as in `track_moments`.

    Source: Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond" (2018), Algorithm 2.
    """
    rest = forms.Rest("nu_max", forms.forms(storage, None, nu_dtype)[1], signed=False)

    def init(params: PyTree) -> KeepMaximumState:
        nu_max = like_params(lambda p: rest.first(jnp.shape(p), real_dtype(p)), params)
        return KeepMaximumState(nu_max, rest.first_scales(nu_max))

    def update(updates: Any, state: KeepMaximumState, params: Any, context: Context) -> tuple[Moments, KeepMaximumState]:
        moments = expect_moments(updates, "keep_maximum()", needs_nu=True)

        def leaf(grad: Any, nu: Array, nu_max: Array) -> Array:
            return jnp.maximum(nu, nu_max.astype(nu.dtype))

        before = rest.widen(state.nu_max, state.scales)
        nu_max = lift(leaf, moments.grad, free=("nu",), nu=moments.nu, nu_max=before)
        kept, scales = rest.narrow(
            nu_max, state.nu_max, state.scales, moments.count, context.stream("keep_maximum"), context.gate
        )
        return moments._replace(nu=nu_max), KeepMaximumState(kept, scales)

    return init, update


class MixSlowMeanState(NamedTuple):
    """State of `mix_slow_mean`.

    Attributes:
      step: steps taken, int32.
      mu_slow: the slow first moment at rest.
      hyperparams: the values that the last step used.
      scales: as in `TrackMomentsState`.
    """

    step: Array
    mu_slow: PyTree
    hyperparams: dict[str, Array]
    scales: dict[str, Array]


@stage(takes="moments", gives="moments")
def mix_slow_mean(
    b3: ScalarOrSchedule = 0.9999, alpha: ScalarOrSchedule = 5.0, *, mu_dtype: Any = None, storage: Storage = "float32"
) -> tuple[Init, Update]:
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
    hypers = {"b3": Hyperparameter("b3", b3, "[0, 1)"), "alpha": Hyperparameter("alpha", alpha, "[0, inf)")}
    rest = forms.Rest("mu_slow", forms.forms(storage, mu_dtype)[0])

    def init(params: PyTree) -> MixSlowMeanState:
        slow = like_params(lambda p: rest.first(jnp.shape(p), wide_dtype(p)), params)
        first = first_values(hypers, scalar_dtype(params))
        return MixSlowMeanState(jnp.zeros((), jnp.int32), slow, first, rest.first_scales(slow))

    def update(updates: Any, state: MixSlowMeanState, params: Any, context: Context) -> tuple[Moments, MixSlowMeanState]:
        moments = expect_moments(updates, "mix_slow_mean()")
        scalars = moments.mu_weight.dtype
        values = {name: h.at(state.step) for name, h in hypers.items()}
        used = {name: cast(value, scalars) for name, value in values.items()}
        average = averaging(values["b3"], used["b3"], complement(values["b3"], scalars))

        def leaf(grad: Any, mu: Array, mu_slow: Array) -> tuple[Array, Array]:
            slow = average(mu_slow.astype(mu.dtype), widen(grad))
            return mu + times(slow, used["alpha"]), slow

        before = rest.widen(state.mu_slow, state.scales)
        mu, slow = lift(leaf, moments.grad, outputs=2, mu=moments.mu, mu_slow=before)
        kept, scales = rest.narrow(
            slow, state.mu_slow, state.scales, moments.count, context.stream("mix_slow_mean"), context.gate
        )
        return moments._replace(mu=mu), MixSlowMeanState(increment(state.step), kept, used, scales)

    return init, update


@stage(takes="moments", gives="moments")
def center() -> tuple[Init, Update]:
    """Makes of ν the variance, and of μ the gradient again.

        nu ← max(nu − |mu|², 0)          mu ← g

    The maximum, which other frameworks leave out, keeps a rounding error below zero from becoming NaN.

    Source: Graves, "Generating Sequences With Recurrent Neural Networks" (2013), §4.2, equations 38 to 45.
    """

    def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[Moments, Any]:
        moments = expect_moments(updates, "center()", needs_nu=True)

        def leaf(grad: Any, mu: Array, nu: Array) -> tuple[Array, Array]:
            return widen(grad), jnp.maximum(nu - square(mu), 0)

        mu, nu = lift(leaf, moments.grad, outputs=2, free=("nu",), mu=moments.mu, nu=moments.nu)
        return moments._replace(mu=mu, nu=nu, mu_weight=jnp.ones_like(moments.mu_weight)), state

    return stateless, update
