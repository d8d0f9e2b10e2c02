"""What makes the first steps right.

Division by the weight gathered, the look ahead, and rectification while ν is young.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import xlogy

from adam_jax._core.arithmetic import multiply, widen
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
from adam_jax._core.spec import Definition, Follower
from adam_jax.stages.moments import (
    Moments,
    accumulate_weight,
    expect_moments,
    expect_weight,
    per_leaf,
)


@stage(takes="moments", gives="moments", bias="corrects")
def correct_bias(*, mu: bool = True, nu: bool = True) -> Definition:
    """Divides each moment by the weight it has gathered.

        mu ← mu / mu_weight          nu ← nu / nu_weight

    With constant decays that is division by 1 − b1ᵗ and 1 − b2ᵗ. With decays that change it is
    still right, where the textbook's powers are not. Without it Adam's first step would be (1 −
    b1)/√(1 − b2) ≈ 3.2 times too long.

    Args:
      mu: whether to correct the first moment.
      nu: whether to correct the second.

    Source: Kingma & Ba (2015), §3.
    """

    def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[Moments, Any]:
        moments = expect_moments(updates, "correct_bias()")
        asked = {"mu": mu and moments.mu is not None, "nu": nu and moments.nu is not None}
        names = [name for name, corrects in asked.items() if corrects]
        weights = {
            name: expect_weight(getattr(moments, f"{name}_weight"), "correct_bias()")
            for name in names
        }
        for name, factor in _reciprocals(weights).items():
            factors = per_leaf(factor)
            corrected = lift(
                lambda g, m, factors=factors: multiply(m, factors()),
                moments.grad,
                free=("nu",),
                **{name: getattr(moments, name)},
            )
            moments = moments._replace(**{name: corrected, f"{name}_weight": jnp.ones_like(factor)})
        return moments, state

    return Definition(stateless, update, corrects=("mu",) * mu + ("nu",) * nu)


def _reciprocals(weights: dict[str, Array]) -> dict[str, Array]:
    """1 over each weight.

    XLA would divide by them at every element instead, and a CPU would wait for it. It makes a
    kernel of each, too: so both are formed in one array where they have one shape.
    """
    if len({weight.shape for weight in weights.values()}) != 1:
        return {name: 1 / weight for name, weight in weights.items()}
    both = 1 / jnp.stack(list(weights.values()))
    return {name: both[i] for i, name in enumerate(weights)}


class LookAheadState(NamedTuple):
    """State of `look_ahead`.

    If it looks ahead with the decay of the moments, it needs no state, and all is `None`.

    Attributes:
      step: steps taken, int32; `None` where there is no schedule.
      weight: 1 − ∏μₜ over the momentum's own values, as the sum of two floats: shape (2 floats),
        after `reset` of some leaves (2 floats, leaves).
      hyperparams: the momentum if it is settable.
    """

    step: Array | None
    weight: Array | None
    hyperparams: dict[str, Array]


@stage(takes="moments", gives="moments", bias="before")
def look_ahead(b1: ScalarOrSchedule | None = None) -> Definition:
    """Replaces μ by the one that the next step would see, corrected for its bias.

    Nesterov's momentum as Nadam has it.

        mu ← b1ₜ₊₁·mu / (1 − ∏ᵢ₌₁ᵗ⁺¹ b1ᵢ) + (1 − b1ₜ)·g / (1 − ∏ᵢ₌₁ᵗ b1ᵢ)

    The weights of the two terms add up to more than 1 at first: the first step is 1 + b1/(1 + b1) ≈
    1.47 times Adam's, in every framework that has Nadam.

    Args:
      b1: the momentum, in [0, 1). `None` takes the decay with which `track_moments` averages.
        PyTorch and Keras average with a constant, and look ahead with a schedule.

    Source: Dozat, "Incorporating Nesterov Momentum into Adam" (2016), Algorithm 2.
    """
    own = b1 is not None
    hypers = Hyperparameters(Hyperparameter("momentum", b1, "[0, 1)")) if own else Hyperparameters()

    def init(params: PyTree) -> LookAheadState:
        scalars = scalar_dtype(params)
        return LookAheadState(
            hypers.first_step(), jnp.zeros(2, scalars) if own else None, hypers.kept(scalars)
        )

    def update(
        updates: Any, state: LookAheadState, params: Any, context: Context
    ) -> tuple[Moments, LookAheadState]:
        moments = expect_moments(updates, "look_ahead()")
        step, weights = increment(state.step), None
        if own:
            assert state.weight is not None
            scalars = state.weight.dtype
            now, then = (hypers["momentum"].at(at, state.hyperparams) for at in (state.step, step))
            decay, rate, rate_then = (
                cast(then, scalars),
                complement(now, scalars),
                complement(then, scalars),
            )
            weights = accumulate_weight(state.weight, rate)
            weight = weights[0]
        else:
            weight = expect_weight(moments.mu_weight, "look_ahead()")
            decay, rate, rate_then = moments.next_mu_decay, moments.mu_rate, moments.next_mu_rate
        # In one array, because XLA makes a kernel of each that stands alone.
        ahead = weight + rate_then * (1 - weight)
        decays = jnp.stack([jnp.broadcast_to(x, weight.shape) for x in (decay, rate)])
        factors = decays / jnp.stack([ahead, weight])
        keep, add = per_leaf(factors[0]), per_leaf(factors[1])
        mu = lift(
            lambda grad, mu: multiply(mu, keep()) + multiply(widen(grad), add()),
            moments.grad,
            mu=moments.mu,
        )
        moments = moments._replace(mu=mu, mu_weight=jnp.ones_like(weight))
        return moments, state._replace(step=step, weight=weights)

    follower = Follower("mu", "the weight that the look ahead divides by", 1, _same_factor)
    return Definition(init, update, hyperparameters=hypers, follows={"weight": follower})


def _same_factor(factor: Array, rate: Array, steps: Array) -> Array:
    return factor


class RectifyState(NamedTuple):
    """State of `rectify`.

    Attributes:
      age: the mean age, in steps, of the squares in ν, the newest being 1; after `reset` of some
        leaves that of each.
      hyperparams: the threshold if it is settable.
    """

    age: Array
    hyperparams: dict[str, Array]


@stage(takes="moments", gives="moments", bias="before")
def rectify(threshold: ScalarOrSchedule = 5.0) -> Definition:
    """Shortens the step while ν has seen few gradients.

    While ν has seen too few, the update does without it.

        age ← 1 + (1 − (1 − b2)/nu_weight)·age
        rho, rho_inf = 2·age − 1, 2/(1 − b2) − 1
        mu ← mu·√((rho − 4)(rho − 2)·rho_inf / ((rho_inf − 4)(rho_inf − 2)·rho))  if rho > threshold
        the update is mu alone                                                       otherwise

    The paper writes rho = rho_inf − 2t·b2ᵗ/(1 − b2ᵗ), a difference of numbers that agree in all but
    their last digits. The mean age is the same number without the difference, and with b2 scheduled
    it is still the age. Comes before `correct_bias()`, whose weight it needs.

    Args:
      threshold: the shortest length rho at which ν is used, ≥ 4. The paper has 4, its authors' code
        and PyTorch 5.

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (2020), Algorithm
    2.
    """
    hypers = Hyperparameters(Hyperparameter("threshold", threshold, "[4, inf)"))

    def init(params: PyTree) -> RectifyState:
        scalars = scalar_dtype(params)
        return RectifyState(jnp.zeros((), scalars), hypers.kept(scalars))

    def update(
        updates: Any, state: RectifyState, params: Any, context: Context
    ) -> tuple[Moments, RectifyState]:
        moments = expect_moments(updates, "rectify()")
        least = cast(hypers["threshold"].at(moments.count - 1, state.hyperparams), state.age.dtype)
        age = 1 + (1 - moments.nu_rate / expect_weight(moments.nu_weight, "rectify()")) * state.age
        rho_inf = 2 / moments.nu_rate - 1
        rho = jnp.minimum(
            2 * age - 1, rho_inf
        )  # where b2 falls, ν holds older squares than it will
        ready = rho > least
        ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        factor = per_leaf(jnp.where(ready, jnp.sqrt(jnp.where(ready, ratio, 1)), 1))
        mu = lift(lambda grad, mu: multiply(mu, factor()), moments.grad, mu=moments.mu)
        return moments._replace(mu=mu, nu_ready=ready), state._replace(age=age)

    follower = Follower("nu", "the mean age of ν", 0, _mean_age)
    return Definition(init, update, hyperparameters=hypers, counter=None, follows={"age": follower})


def _mean_age(factor: Array, rate: Array, steps: Array) -> Array:
    """Returns the mean age of a ν.

    A ν of t steps has the debias factor w = 1 − b2ᵗ and the mean age 1/(1 − b2) − t·b2ᵗ/w. For a
    young one that is a difference of large numbers. With x = −log b2, X = t·x and 1/(1 − e⁻ˣ) =
    1/x + 1/2 + x/12 − x³/720 …, these cancel.

    Args:
      factor: the debias factor, as two floats.
      rate: 1 − b2.
      steps: t.
    """
    high, low = factor
    left, per_step, in_all = (1 - high) - low, -jnp.log1p(-rate), -jnp.log1p(-high)
    long = 1 / rate + xlogy(left, left) / (per_step * jnp.where(high > 0, high, 1))

    def cubic(x: Array) -> Array:
        return x / 12 - x**3 / 720

    t = in_all / per_step
    young = (t + 1) / 2 + cubic(per_step) - t * cubic(in_all)
    age = jnp.where(in_all < 0.5, young, long)
    return jnp.where(high > 0, jnp.clip(age, 1, steps.astype(high.dtype)), 0)
