"""From `Moments` to plain updates.

The quotient and what may replace it, and what rescales a whole leaf after it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adam_jax._core.arithmetic import atan2, divide, multiply, sqrt, widen
from adam_jax._core.context import Context
from adam_jax._core.decorators import stage, stateless
from adam_jax._core.errors import expect_params
from adam_jax._core.hyperparams import (
    Hyperparameter,
    Hyperparameters,
    ScalarOrSchedule,
    cast,
    increment,
)
from adam_jax._core.leaves import PyTree, as_wide, finfo, scalar_dtype
from adam_jax._core.lift import lift
from adam_jax._core.spec import Definition, Init, Update
from adam_jax._core.sums import norm, optimization_barrier
from adam_jax.stages.moments import expect_moments, expect_weight, per_leaf


class ScaleByMomentsState(NamedTuple):
    """State of `scale_by_moments`: the ε that are settable."""

    hyperparams: dict[str, Array]


@stage(takes="moments", gives="updates")
def scale_by_moments(
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    *,
    floor: bool = False,
    root: bool = True,
    correct_last: bool = False,
) -> Definition:
    """The quotient that is Adam: the mean gradient in units of its root mean square.

        update = mu / (√(nu + eps_root) + eps)

    The updates are float32 or wider. An ε of 0 counts as 2⁻⁶³ (float32), the root of the smallest
    normal number: 0/0 does not appear, and a gradient whose square underflows makes a bounded step.

    Args:
      eps: what is added outside the root, in units of the gradient, ≥ 0.
      eps_root: what is added inside, in units of its square, ≥ 0. With one above 0, an update is
        smooth where the gradient is 0.
      floor: take max(√(nu + eps_root), eps) for the denominator instead of the sum.
      root: whether ν is in units of the gradient's square. Without, ν itself stands where its root
        does: AdaMax.
      correct_last: correct ν's bias after ε was added, not before: mu·√nu_weight / (√(nu +
        eps_root) + eps). Stands behind `correct_bias(nu=False)`, which leaves ν its weight; behind
        `correct_bias()` it changes nothing.

    Raises:
      ValueError: for an ε below 0 or NaN.

    Source: Kingma & Ba (2015), Algorithm 1, as PyTorch and Optax have it. With `correct_last` the
    efficient form at the end of §2, whose ε̂ counts as ε̂/√(1 − b2ᵗ) in the other, as TensorFlow
    and Keras have it.
    """
    hypers = Hyperparameters(
        Hyperparameter("eps", eps, "[0, inf)"), Hyperparameter("eps_root", eps_root, "[0, inf)")
    )

    def init(params: PyTree) -> ScaleByMomentsState:
        return ScaleByMomentsState(hypers.kept(scalar_dtype(params)))

    def update(
        updates: Any, state: ScaleByMomentsState, params: Any, context: Context
    ) -> tuple[PyTree, ScaleByMomentsState]:
        moments = expect_moments(updates, "scale_by_moments()", needs_nu=True)
        scalars = scalar_dtype(moments.mu)
        used = {
            name: cast(value, scalars)
            for name, value in hypers.at(moments.count - 1, state.hyperparams).items()
        }
        readiness = None if moments.nu_ready is None else per_leaf(moments.nu_ready)
        weight = (
            expect_weight(moments.nu_weight, "scale_by_moments(correct_last=True)")
            if correct_last
            else None
        )
        correction = None if weight is None else per_leaf(jnp.sqrt(weight))

        def leaf(grad: Any, mu: Array, nu: Array) -> Array:
            least = 2.0 ** (finfo(nu.dtype).minexp // 2)
            known = isinstance(eps, float) and eps > least
            outside = (
                np.asarray(eps, nu.dtype)
                if known
                else jnp.maximum(used["eps"].astype(nu.dtype), least)
            )
            if not (isinstance(eps_root, (int, float)) and eps_root == 0):
                nu = nu + used["eps_root"].astype(nu.dtype)
            size = sqrt(nu) if root else nu
            scaled = divide(mu, lax.max(size, outside) if floor else lax.add(size, outside))
            scaled = scaled if correction is None else multiply(scaled, correction())
            return scaled if readiness is None else jnp.where(readiness(), scaled, mu)

        return lift(leaf, moments.grad, free=("nu",), mu=moments.mu, nu=moments.nu), state

    return Definition(init, update, hyperparameters=hypers, counter=None, root=root)


@stage(takes="moments", gives="updates")
def scale_by_atan2(*, a: float = 1.0, b: float = 1.0) -> tuple[Init, Update]:
    """Adam's quotient as an angle, which needs no ε: where both moments are 0 the angle is 0.

        update = a·atan2(mu, b·√nu)

    Close to a/b·mu/√nu where that is small, and never larger than a·π/2. A complex μ keeps its
    phase.

    Args:
      a: factor outside, > 0.
      b: factor inside, > 0.

    Source: Everett et al., "Scaling Exponents Across Parameterizations and Optimizers" (2024), the
    section on ε.
    """
    Hyperparameter("a", a, "(0, inf)")
    Hyperparameter("b", b, "(0, inf)")

    def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[PyTree, Any]:
        moments = expect_moments(updates, "scale_by_atan2()", needs_nu=True)

        def leaf(grad: Any, mu: Array, nu: Array) -> Array:
            below = b * sqrt(nu)
            if not jnp.iscomplexobj(mu):
                return a * atan2(mu, below)
            size = jnp.abs(mu)
            return multiply(divide(mu, jnp.where(size == 0, 1, size)), a * atan2(size, below))

        return lift(leaf, moments.grad, free=("nu",), mu=moments.mu, nu=moments.nu), state

    return stateless, update


@stage(takes="moments", gives="updates")
def take_mu(*, nesterov: bool = False) -> tuple[Init, Update]:
    """The first moment itself as the update: momentum.

        update = mu                              or, with nesterov,
        update = mu_decay·mu + mu_rate·g     what μ would be, did the same gradient come again

    Args:
      nesterov: whether to look ahead.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning"
    (2013), §2.
    """

    def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[PyTree, Any]:
        moments = expect_moments(updates, "take_mu()")

        def ahead(grad: Any, mu: Array) -> Array:
            return (
                multiply(mu, moments.mu_decay) + multiply(widen(grad), moments.mu_rate)
                if nesterov
                else mu
            )

        return lift(ahead, moments.grad, mu=moments.mu), state

    return stateless, update


class ClipElementsState(NamedTuple):
    """State of `clip_elements`.

    Attributes:
      step: steps taken, int32; `None` where there is no schedule.
      hyperparams: the limit if it is settable.
    """

    step: Array | None
    hyperparams: dict[str, Array]


@stage(takes="updates", gives="updates", rate="before")
def clip_elements(limit: ScalarOrSchedule) -> Definition:
    """Limits every element of the updates to ±limit; a complex one to that absolute value.

    Args:
      limit: ≥ 0.

    Source: Taniguchi et al., "ADOPT" (2024), Algorithm 2.
    """
    hypers = Hyperparameters(Hyperparameter("limit", limit, "[0, inf)"))

    def init(params: PyTree) -> ClipElementsState:
        return ClipElementsState(hypers.first_step(), hypers.kept(scalar_dtype(params)))

    def update(
        updates: Any, state: ClipElementsState, params: Any, context: Context
    ) -> tuple[PyTree, ClipElementsState]:
        used = cast(hypers["limit"].at(state.step, state.hyperparams), scalar_dtype(updates))

        def leaf(update: Any) -> Array:
            update = as_wide(update)
            most = used.astype(finfo(update.dtype).dtype)
            if jnp.iscomplexobj(update):
                size = jnp.abs(update)
                return multiply(
                    update, jnp.where(size > most, most / jnp.where(size == 0, 1, size), 1)
                )
            return jnp.clip(update, -most, most)

        return lift(leaf, updates), state._replace(step=increment(state.step))

    return Definition(init, update, hyperparameters=hypers)


@stage(takes="updates", gives="updates", rate="before")
def scale_by_trust_ratio() -> tuple[Init, Update]:
    """Gives each leaf's update the norm of its parameter.

        update ← update·‖params‖ / ‖update‖          where neither norm is 0, else unchanged

    Norms are Euclidean, of a leaf, in float32 or wider.

    Raises:
      ValueError: in `update`, without `params`.

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes"
    (2020), Algorithm 2, with φ the identity.
    """

    def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[PyTree, Any]:
        expect_params(params, "scale_by_trust_ratio()")

        def leaf(update: Any, param: Any) -> Array:
            # The norm has to be that of the numbers that are scaled, not of the same formula in
            # another loop, which may round it otherwise, and differently on another mesh.
            made = optimization_barrier(as_wide(update))
            size, length = norm(as_wide(param)), norm(made)
            known = (size != 0) & (
                length != 0
            )  # so is NaN, which makes the whole leaf NaN, as in Optax: it is not hidden
            # One after the other: the quotient of the norms can be infinite.
            return multiply(divide(made, jnp.where(known, length, 1)), jnp.where(known, size, 1))

        return lift(leaf, updates, params=params), state

    return stateless, update
