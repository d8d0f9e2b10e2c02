"""What frameworks have in common, and the family has not.

Their clipping, their Nadam's momentum, what they accumulate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from adam_jax._core.arithmetic import divide, multiply, widen
from adam_jax._core.context import Context
from adam_jax._core.decorators import stage
from adam_jax._core.errors import expect_one_of
from adam_jax._core.hyperparams import Hyperparameter, Hyperparameters, cast, increment
from adam_jax._core.hyperparams import ScalarOrSchedule as Number
from adam_jax._core.leaves import PyTree, scalar_dtype
from adam_jax._core.lift import lift
from adam_jax._core.spec import Definition
from adam_jax._core.sums import norm
from adam_jax._core.transformation import Transformation
from adam_jax.stages.bias import correct_bias, look_ahead
from adam_jax.stages.decay import add_decayed_weights
from adam_jax.stages.gradient_clipping import clip_global_norm
from adam_jax.stages.refine import keep_maximum
from adam_jax.stages.scale import ClipElementsState, clip_elements, scale_by_moments, take_mu
from adam_jax.stages.track import track_moments
from adam_jax.storage.formats import Storage

Stages = tuple[Transformation, ...]


def is_zero(value: Any) -> bool:
    """Whether it is the number 0, with which frameworks leave a part out; a traced 0 keeps it."""
    return isinstance(value, (int, float)) and value == 0


def decays(weight_decay: Number | None) -> Stages:
    """What adds the decay before the learning rate.

    Nothing where there is none, so that `update` needs no parameters.
    """
    return (
        ()
        if weight_decay is None or is_zero(weight_decay)
        else (add_decayed_weights(weight_decay),)
    )


def adam_direction(
    b1: Number, b2: Number, eps: Number, amsgrad: bool, storage: Storage, *, correct_last: bool
) -> Stages:
    """Adam up to the learning rate.

    The maximum is that of the raw ν, as in every framework but Optax.
    """
    expect_one_of("amsgrad", amsgrad, (True, False))
    return (
        track_moments(b1, b2, storage=storage),
        *((keep_maximum(storage=storage),) if amsgrad else ()),
        correct_bias(nu=not correct_last),
        scale_by_moments(eps, correct_last=correct_last),
    )


def adamax_direction(b1: Number, b2: Number, eps: Number, storage: Storage) -> Stages:
    """AdaMax up to the learning rate, with ε beside the maximum.

    Where `family.adamax` has it inside.
    """
    return (
        track_moments(b1, b2, nu_rule="infinity", storage=storage),
        correct_bias(),
        scale_by_moments(eps, root=False),
    )


def nadam_direction(
    b1: Number, b2: Number, eps: Number, momentum_decay: Number, storage: Storage
) -> Stages:
    """Nadam up to the learning rate.

    It averages with b1 and looks ahead with `WarmingMomentum`.
    """
    momentum: Any = WarmingMomentum(
        b1, momentum_decay
    )  # mypy does not see that a tuple can be called
    return (
        track_moments(b1, b2, storage=storage),
        look_ahead(momentum),
        correct_bias(),
        scale_by_moments(eps),
    )


def accumulates(momentum: Number, storage: Storage, nesterov: bool = False) -> Stages:
    """The sum mu ← momentum·mu + update."""
    if is_zero(momentum):
        return ()
    return track_moments(momentum, None, mu_rule="sum", storage=storage), take_mu(nesterov=nesterov)


class WarmingMomentum(NamedTuple):
    """The schedule b1·(1 − ½·0.96^(t·decay)) at step t, from 1.

    A tuple, so that equal ones make equal transformations.
    """

    b1: Number
    decay: Number

    def __call__(self, count: Any) -> Any:
        b1, decay = _values(count, b1=self.b1, momentum_decay=self.decay)
        steps = (count + 1).astype(b1.dtype)
        return b1 * (1 - 0.5 * jnp.power(0.96, steps * decay))


class _Product(NamedTuple):
    """The schedule learning_rate·weight_decay."""

    learning_rate: Number
    weight_decay: Number

    def __call__(self, count: Any) -> Any:
        rate, decay = _values(count, **self._asdict())
        return rate * decay


def _values(count: Array, **numbers: Number) -> list[Array]:
    return [
        cast(Hyperparameter(name, number).at(count), jnp.result_type(float))
        for name, number in numbers.items()
    ]


def decays_by_rate(learning_rate: Number, weight_decay: Number | None) -> Stages:
    """Returns what makes the step −learning_rate·weight_decay·params.

    It stands behind an accumulator of steps, which must not gather it.
    """
    if weight_decay is None or is_zero(weight_decay):
        return ()
    # The rate is in the product already; here it says on which side of it the stage stands.
    product: Any = _Product(learning_rate, weight_decay)
    return (add_decayed_weights(product, learning_rate=1.0),)


def clips(
    clipnorm: Number | None, clipvalue: Number | None, global_clipnorm: Number | None
) -> Stages:
    """The clipping of gradients that Keras' optimizers have built in, of which one may be used."""
    given = {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm}
    used = [(name, limit) for name, limit in given.items() if limit is not None]
    if len(used) > 1:
        names = " and ".join(name for name, _ in used)
        raise ValueError(f"found {names}; expected one of them at most. Chain the other in front.")
    for name, limit in used:
        Hyperparameter(name, limit, "(0, inf)")
    return tuple(
        clip_elements(limit)
        if name == "clipvalue"
        else clip_global_norm(limit)
        if name == "global_clipnorm"
        else clip_norm(limit)
        for name, limit in used
    )


@stage(takes="updates", gives="updates", rate="before")
def clip_norm(limit: Number) -> Definition:
    """Shortens each leaf's update where its Euclidean norm is above the limit.

    Args:
      limit: > 0.
    """
    hypers = Hyperparameters(Hyperparameter("limit", limit, "(0, inf)"))

    def init(params: PyTree) -> ClipElementsState:
        return ClipElementsState(hypers.first_step(), hypers.kept(scalar_dtype(params)))

    def update(
        updates: Any, state: ClipElementsState, params: Any, context: Context
    ) -> tuple[PyTree, ClipElementsState]:
        most = cast(hypers["limit"].at(state.step, state.hyperparams), scalar_dtype(updates))

        def leaf(update: Any) -> Array:
            size = norm(widen(update))
            above = size > most
            # One by one: their quotient may be subnormal.
            return multiply(
                divide(widen(update), jnp.where(above, size, 1)), jnp.where(above, most, 1)
            )

        return lift(leaf, updates), state._replace(step=increment(state.step))

    return Definition(init, update, hyperparameters=hypers)
