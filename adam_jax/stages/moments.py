"""`Moments`: what travels from `track_moments` to the stage that turns moments into updates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adam_jax._core.leaves import PyTree, takes_part


class Moments(NamedTuple):
    """What flows between `track_moments` and the stage that turns moments into updates.

    Trees are shaped like the parameters; scalars are float32, or float64 where any parameter is.

    Attributes:
      grad: this step's gradient, as it came in, or in the dtype of the moments where that is wider
        than float32.
      mu: first moment estimate, float32 or wider; the widened gradient where no first moment is
        tracked.
      nu: second moment estimate, real, float32 or wider; `None` where none is tracked.
      mu_weight: the weight that `mu` has gathered, in (0, 1]: 1 − ∏β₁. 1 once `mu` is corrected.
        After `reset` of some leaves a vector, with an entry for each leaf that takes part. `None`
        with `track_moments(debias=False)`.
      nu_weight: the same for `nu`.
      mu_decay: this step's β₁.
      mu_rate: the share of this step's gradient in `mu`: 1 − β₁.
      nu_rate: the share of this step's square in `nu`: 1 − β₂.
      count: the number of this step, from 1, int32.
      next_mu_decay: β₁ of the next step.
      next_mu_rate: 1 − β₁ of the next step.
      nu_ready: whether ν can be trusted yet, a boolean like `nu_weight`; `None` for always. Where
        it cannot, the update is `mu`.
    """

    grad: PyTree
    mu: PyTree
    nu: PyTree
    mu_weight: Array | None
    nu_weight: Array | None
    mu_decay: Array
    mu_rate: Array
    nu_rate: Array
    count: Array  # type: ignore[assignment]  # tuple.count is never called
    next_mu_decay: Array
    next_mu_rate: Array
    nu_ready: Array | None = None


def accumulate_weight(weight: Array, rate: Array) -> Array:
    """The next weight: an average of ones, moved by `rate`.

    A weight is kept as the sum of two floats, `weight[0] + weight[1]`, the second being what the
    first rounds away. One float is not enough: near 0.01 and at β₂ = 0.999999, ten thousand
    roundings add up to 3e-6. They are one array, and the weights of both moments too, because XLA
    makes a kernel of every scalar.
    """
    high, low = weight
    step = low + rate * ((1 - high) - low)
    grown = high + step
    return jnp.stack([grown, (high - grown) + step])


def per_leaf(value: Array) -> Callable[[], Array]:
    """Returns a function that yields the value of each trained leaf, in order.

    A scalar is the value of all leaves. A vector has an entry for each.
    """
    return (lambda: value) if jnp.ndim(value) == 0 else functools.partial(next, iter(value))


def expect_moments(updates: Any, caller: str, needs_nu: bool = False) -> Moments:
    """`updates`, if they are Moments, with a ν where one is needed."""
    if not isinstance(updates, Moments):
        raise TypeError(
            f"{caller} takes Moments, but was given {type(updates).__name__}. Chain it behind "
            "track_moments(...), with no stage between that consumes them."
        )
    if needs_nu and updates.nu is None and any(map(takes_part, jax.tree.leaves(updates.grad))):
        raise ValueError(
            f"{caller} needs ν, and track_moments(..., b2=None) tracks none. Give b2 a decay, or "
            "use take_mu()."
        )
    return updates


def expect_weight(weight: Array | None, caller: str) -> Array:
    """Returns the weight that a moment has gathered.

    Raises:
      ValueError: if it is not kept.
    """
    if weight is None:
        raise ValueError(
            f"{caller} needs the weight of a moment, and track_moments(debias=False) keeps none. "
            "Leave debias=True."
        )
    return weight
