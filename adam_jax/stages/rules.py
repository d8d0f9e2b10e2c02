"""The rules by which ν moves, and the classes of the states of `track_moments`."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from adam_jax._core.arithmetic import lerp, square
from adam_jax.stages.blocks import block_mean


class NuRule(NamedTuple):
    """How ν moves.

    Attributes:
      sees: (g, mu) -> what ν averages, real.
      moves: (nu, seen, average, b2, rate, eps) -> the next ν; `average(nu, seen)` is their average,
        scalars have ν's dtype.
      squared: whether ν is in units of the gradient's square.
      weighs: whether ν gathers weight as an average does. A maximum has all of it at once.
      name: of ν in the class of a state. Rules that lead to the same quantity have the same.
      meaning: what ν is; "{}" is what it is made of.
    """

    sees: Callable[[Array, Array], Array]
    moves: Callable[..., Array]
    squared: bool = True
    weighs: bool = True
    name: str = "Square"
    meaning: str = "the mean of squared {}"


NU_RULES = {
    "square": NuRule(
        lambda g, mu: square(g), lambda nu, seen, average, b2, rate, eps: average(nu, seen)
    ),
    "belief": NuRule(
        lambda g, mu: square(g - mu),
        lambda nu, seen, average, b2, rate, eps: average(nu, seen) + eps,
        name="Belief",
        meaning="the mean of squared distances of {} from μ",
    ),
    "yogi": NuRule(
        lambda g, mu: square(g),
        lambda nu, seen, average, b2, rate, eps: nu - rate * jnp.sign(nu - seen) * seen,
    ),
    "infinity": NuRule(
        lambda g, mu: jnp.abs(g),
        lambda nu, seen, average, b2, rate, eps: jnp.maximum(b2 * nu, seen + eps),
        squared=False,
        weighs=False,
        name="Infinity",
        meaning="the decaying maximum of {}",
    ),
}


def _state_class(mu: str, nu: str) -> Any:
    """The class of the states of `track_moments` that keep these moments.

    A class says what the moments in it mean, so that a state of Adam is not taken for one of
    AdaMax.
    """
    moments = [name for name, kind in (("mu", mu), ("nu", nu)) if kind]
    kind: Any = collections.namedtuple(  # type: ignore[misc]
        f"Track{mu}{nu}State",
        ["count", *moments, "weights", "hyperparams", "scales"],
        module=__name__,
    )
    kind.__doc__ = f"""State of `track_moments`, with the moments {" and ".join(moments)}.

    Attributes:
      count: steps taken, int32; stays at 2³¹ − 1.
      mu: first moments as they are stored, if there are any.
      nu: second moments as they are stored, if there are any.
      weights: the debias factors of the moments, each as the sum of two floats: shape (2 floats,
        moments), and, once `reset` gave some leaves a start of their own, (2 floats, moments,
        leaves). A sum and a maximum have none. `None` where no moment has one.
      hyperparams: the hyperparameters that are settable.
      scales: "mu_scale" and "nu_scale", where these are stored as codes: int16 arrays by the path
        of their leaf.
    """
    return kind


STATES: dict[tuple[str, str], Any] = {
    (mu, delayed + nu): _state_class(mu, delayed + nu)
    for mu in ("", "Mean", "Sum")
    for delayed in ("", "Delayed")
    for nu in ("", *dict.fromkeys(rule.name for rule in NU_RULES.values()))
    if (mu or nu) and (nu or not delayed)
}
"""The classes of states by the kinds of μ and ν."""

globals().update({kind.__name__: kind for kind in STATES.values()})  # where pickle looks for them


def nu_of_gradient(rule: NuRule, g: Array, nu: Array, rate: Array) -> Array:
    """Returns ν after one step whose gradient was g, with a μ of zero."""
    seen = jnp.broadcast_to(block_mean(rule.sees(g, jnp.zeros_like(g)), nu.shape), nu.shape).astype(
        nu.dtype
    )
    return rule.moves(
        nu, seen, lambda nu, seen: lerp(nu, seen, rate), 1 - rate, rate, jnp.zeros_like(rate)
    )
