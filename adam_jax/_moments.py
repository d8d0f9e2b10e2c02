"""`Moments`, and how they move: every member of the family begins with `track_moments`.

A moment is an exponential average that starts at zero, so it is Σ weights·values with Σ weights < 1. Its weight is the same
average of the constant 1, moved by the same rate at the same time. Later stages divide by it; they need no decay, no
count and no formula, and stay right when the decay changes from step to step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from adam_jax import storage as forms
from adam_jax._hyperparams import Hyperparameter, ScalarOrSchedule, cast, complement, expect_one_of, first_values, increment
from adam_jax._sums import mean
from adam_jax._transformation import Context, Init, Update, stage
from adam_jax._tree import (
    PyTree,
    averaging,
    lift,
    real_dtype,
    scalar_dtype,
    square,
    takes_part,
    times,
    wide_dtype,
    widen,
)

Storage = forms.Storage
Blocks: TypeAlias = Literal["leaf", "output"] | Callable[[str, tuple[int, ...]], tuple[int, ...]]


class Moments(NamedTuple):
    """What flows between `track_moments` and the stage that turns moments into updates.

    Trees are shaped like the parameters; scalars are float32, or float64 where any parameter is.

    Attributes:
      grad: this step's gradient, as it came in.
      mu: first moment estimate, float32 or wider; the widened gradient where no first moment is tracked.
      nu: second moment estimate, real, float32 or wider; `None` where none is tracked.
      mu_weight: the weight that `mu` has gathered, in (0, 1]: 1 − ∏β₁. 1 once `mu` is corrected. After `reset` of some leaves a
        vector, with an entry for each leaf that takes part.
      nu_weight: the same for `nu`.
      mu_decay: this step's β₁.
      mu_rate: the share of this step's gradient in `mu`: 1 − β₁.
      nu_rate: the share of this step's square in `nu`: 1 − β₂.
      count: the number of this step, from 1, int32.
      nu_ready: whether ν can be trusted yet, a boolean like `nu_weight`; `None` for always. Where it cannot, the update is `mu`.
    """

    grad: PyTree
    mu: PyTree
    nu: PyTree
    mu_weight: Array
    nu_weight: Array
    mu_decay: Array
    mu_rate: Array
    nu_rate: Array
    count: Array  # type: ignore[assignment]  # tuple.count is never called
    nu_ready: Array | None = None


def grow(weight: Array, rate: Array) -> Array:
    """The next weight: an average of ones, moved by `rate`.

    A weight is kept as the sum of two floats, `weight[0] + weight[1]`, the second being what the first rounds away. One float
    is not enough: near 0.01 and at β₂ = 0.999999, ten thousand roundings add up to 3e-6. They are one array, and the weights
    of both moments too, because XLA makes a kernel of every scalar.
    """
    high, low = weight
    step = low + rate * ((1 - high) - low)
    grown = high + step
    return jnp.stack([grown, (high - grown) + step])


def by_leaf(value: Array) -> Callable[[], Array]:
    """What each leaf gets that takes part, in turn: of a scalar the scalar, of a vector its own entry."""
    return (lambda: value) if jnp.ndim(value) == 0 else functools.partial(next, iter(value))


def block_mean(x: Array, shape: tuple[int, ...]) -> Array:
    """The mean over the axes that are 1 in `shape`, of which blocks share one number."""
    shared = tuple(axis for axis, size in enumerate(shape) if size == 1 != x.shape[axis])
    return mean(x, shared) if shared else x


def expect_moments(updates: Any, who: str, needs_nu: bool = False) -> Moments:
    """`updates`, if they are Moments, with a ν where one is needed."""
    if not isinstance(updates, Moments):
        raise TypeError(
            f"{who} takes Moments, but was given {type(updates).__name__}. Chain it behind track_moments(...), with no stage "
            f"between that consumes them."
        )
    if needs_nu and updates.nu is None and any(map(takes_part, jax.tree.leaves(updates.grad))):
        raise ValueError(f"{who} needs ν, and track_moments(..., b2=None) tracks none. Give b2 a decay, or use take_mu().")
    return updates


class NuRule(NamedTuple):
    """How ν moves.

    Attributes:
      sees: (g, mu) -> what ν averages, real.
      moves: (nu, seen, average, b2, rate, eps) -> the next ν; `average(nu, seen)` is their average, scalars have ν's dtype.
      weighs: whether ν gathers weight as an average does. A maximum has all of it at once.
    """

    sees: Callable[[Array, Array], Array]
    moves: Callable[..., Array]
    weighs: bool = True


NU_RULES = {
    "square": NuRule(lambda g, mu: square(g), lambda nu, seen, average, b2, rate, eps: average(nu, seen)),
    "belief": NuRule(lambda g, mu: square(g - mu), lambda nu, seen, average, b2, rate, eps: average(nu, seen) + eps),
    "yogi": NuRule(lambda g, mu: square(g), lambda nu, seen, average, b2, rate, eps: nu - rate * jnp.sign(nu - seen) * seen),
    "infinity": NuRule(
        lambda g, mu: jnp.abs(g), lambda nu, seen, average, b2, rate, eps: jnp.maximum(b2 * nu, seen + eps), weighs=False
    ),
}


class TrackMomentsState(NamedTuple):
    """State of `track_moments`.

    Attributes:
      count: steps taken, int32; stays at 2³¹ − 1.
      mu: first moments at rest.
      nu: second moments at rest.
      weights: the weights of `mu` and of `nu`, each as the sum of two floats: shape (2 floats, 2 moments), and, once `reset` gave
        some leaves a start of their own, (2 floats, 2 moments, leaves).
      hyperparams: the values that the last step used.
      scales: "mu_scale" and "nu_scale", where these rest as codes: the exponents of the units of each such leaf, of its codes and
        for those of the next step: int16, (leaves, 2).
    """

    count: Array  # type: ignore[assignment]  # tuple.count is never called
    mu: PyTree
    nu: PyTree
    weights: Array
    hyperparams: dict[str, Array]
    scales: dict[str, Array]


class TrackMeanState(NamedTuple):
    """State of `track_moments(b1, None)`: what is not tracked has no field, so `optax.tree.get` finds what is."""

    count: Array  # type: ignore[assignment]
    mu: PyTree
    weights: Array
    hyperparams: dict[str, Array]
    scales: dict[str, Array]


class TrackSquareState(NamedTuple):
    """State of `track_moments(None, b2)`."""

    count: Array  # type: ignore[assignment]
    nu: PyTree
    weights: Array
    hyperparams: dict[str, Array]
    scales: dict[str, Array]


@stage(takes="updates", gives="moments")
def track_moments(
    b1: ScalarOrSchedule | None = 0.9,
    b2: ScalarOrSchedule | None = 0.999,
    *,
    mu_rule: Literal["mean", "sum"] = "mean",
    nu_rule: Literal["square", "belief", "yogi", "infinity"] = "square",
    nu_eps: ScalarOrSchedule = 0.0,
    nu_init: float = 0.0,
    nu_delay: bool = False,
    blocks: Blocks | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    storage: Storage = "float32",
) -> tuple[Init, Update]:
    """Averages the gradients and their squares.

        mu ← mu + (1 − b1)·(g − mu)          mu_weight ← mu_weight + (1 − b1)·(1 − mu_weight)
        nu ← nu + (1 − b2)·(|g|² − nu)       nu_weight ← nu_weight + (1 − b2)·(1 − nu_weight)

    Gradients are widened to float32 first (float64 and complex stay), so the state never has a half-precision dtype unless
    it is asked for. Beyond ±2⁶² (4.6e18, in float32) they saturate, infinities too, so that ν never overflows. A NaN is not
    hidden: it makes the moments, and so the parameter, of its element NaN for good (8-bit moments forget it, the parameter does
    not).

    Args:
      b1: decay of the first moment, in [0, 1); `None` tracks none, and `mu` is the gradient.
      b2: decay of the second moment, in [0, 1); `None` tracks none.
      mu_rule: "mean", or "sum" for mu ← b1·mu + g, the heavy ball that other frameworks call momentum. It has weight 1.
      nu_rule: how ν moves. "square" averages |g|² (Adam), "belief" |g − mu|² and adds nu_eps (AdaBelief), "yogi" steps towards
        |g|² by (1 − b2)·|g|² at most, "infinity" takes max(b2·nu, |g| + nu_eps), whose weight is 1 (AdaMax).
      nu_eps: what the rules "belief" and "infinity" add at every step, ≥ 0.
      nu_init: where ν starts, ≥ 0.
      nu_delay: hand on the ν of the step before, which has not seen this gradient. The first step only fills ν: its β₂ is
        0 and the gradient that it hands on is zero.
      blocks: which axes of a leaf share one ν: "leaf" for all, "output" for all but the last (the outputs of a Flax kernel),
        or a function (path as `jax.tree_util.keystr` writes it, shape) -> axes. `None` shares none.
      mu_dtype: the floating dtype in which every leaf of `mu` rests between steps, however small; `storage=` for the habit of
        Optax. Complex leaves stay as they are. `None`: as `storage` has it.
      nu_dtype: the same for `nu`.
      storage: how the moments rest: "float32" (or wider, as they are computed), "bfloat16", "8bit", an object of
        `adam_jax.storage`, or a pair (for mu, for nu). The update of a step uses the moments before they are narrowed.

    Raises:
      ValueError: for a number outside its range, an unknown rule or storage, or a dtype beside a storage that says otherwise; in
        `update`, for a gradient tree that does not fit, or a state that rests otherwise.
      TypeError: for what is no number, no scalar and no schedule.

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization" (2015), Algorithm 1 and §3.
    """
    hypers = _hypers(b1, b2, nu_rule, nu_eps, nu_init)
    _check_options(b1, b2, mu_rule, nu_rule, blocks)
    rule = NU_RULES[nu_rule]
    mu_form, nu_form = forms.forms(storage, mu_dtype, nu_dtype)
    rests = [forms.Rest("mu", mu_form)] if b1 is not None else []
    rests += [forms.Rest("nu", nu_form, signed=False, turn=16, start=nu_init)] if b2 is not None else []

    kind: Any = TrackSquareState if b1 is None else TrackMeanState if b2 is None else TrackMomentsState

    def init(params: PyTree) -> Any:
        scalars = scalar_dtype(params)

        def first(rest: forms.Rest, path: Any, p: Any) -> Array | None:
            if not takes_part(p):
                return None
            if rest.name == "mu":
                return rest.first(jnp.shape(p), wide_dtype(p))
            return rest.first(_shared_shape(blocks, path, p), real_dtype(p))

        kept = {rest.name: jax.tree_util.tree_map_with_path(functools.partial(first, rest), params) for rest in rests}
        scales = forms.all_first_scales(rests, kept)
        zero, weights = jnp.zeros((), jnp.int32), jnp.zeros((2, 2), scalars)
        return kind(zero, *kept.values(), weights, first_values(hypers, scalars), scales)

    def update(grads: Any, state: Any, params: Any, context: Context) -> tuple[Moments, Any]:
        scalars = state.weights.dtype
        values = {name: h.at(state.count) for name, h in hypers.items()}
        used = {name: cast(value, scalars) for name, value in values.items()}
        zero, one = jnp.zeros((), scalars), jnp.ones((), scalars)
        mu_decay, mu_rate = (zero, one) if b1 is None else (used["b1"], complement(values["b1"], scalars))
        nu_decay, nu_rate = (zero, one) if b2 is None else (used["b2"], complement(values["b2"], scalars))
        mu_rate = one if mu_rule == "sum" else mu_rate
        if nu_delay:
            first = state.weights[0, 1] == 0
            nu_decay, nu_rate = jnp.where(first, zero, nu_decay), jnp.where(first, one, nu_rate)
            firsts = by_leaf(first)

        mu_average = averaging(values.get("b1", 0.0), mu_decay, mu_rate)
        nu_decays, nu_rates = by_leaf(nu_decay), by_leaf(nu_rate)

        def moment(g: Array, mu: Array | None) -> Array:
            if mu is None:
                return jnp.where(firsts(), jnp.zeros_like(g), g) if nu_delay else g
            mu = mu.astype(g.dtype)
            return times(mu, mu_decay) + g if mu_rule == "sum" else mu_average(mu, g)

        def second_moment(g: Array, mu: Array, nu: Array) -> Array:
            seen = block_mean(rule.sees(g, mu), nu.shape)
            nu = nu.astype(seen.dtype)
            decay, rate = nu_decays(), nu_rates()
            average = averaging(values.get("b2", 0.0), decay, rate)
            return rule.moves(nu, seen, average, *(s.astype(nu.dtype) for s in (decay, rate, used.get("nu_eps", zero))))

        def leaf(grad: Any, mu: Array | None, nu: Array | None) -> tuple[Array, Array | None]:
            g = widen(grad)
            mu = moment(g, mu)
            return mu, None if nu is None else second_moment(g, mu, nu)

        old = {"mu": None, "nu": None} | {rest.name: rest.widen(getattr(state, rest.name), state.scales) for rest in rests}
        mu, nu = lift(leaf, grads, outputs=2, free=() if blocks is None else ("nu",), **old)
        count = increment(state.count)
        kept, scales = forms.all_narrow(rests, {"mu": mu, "nu": nu}, state, count, context.stream("track_moments"), context.gate)
        nu = nu if b2 is not None else None
        rates = (mu_rate, nu_rate if rule.weighs else one)
        weights = grow(state.weights, jnp.stack([jnp.broadcast_to(rate, state.weights.shape[2:]) for rate in rates]))
        moments = Moments(
            grad=grads,
            mu=mu,
            nu=old["nu"] if nu_delay else nu,
            mu_weight=weights[0, 0],
            nu_weight=one if nu_delay else weights[0, 1],
            mu_decay=mu_decay,
            mu_rate=mu_rate,
            nu_rate=nu_rate,
            count=count,
        )
        return moments, kind(count, *kept.values(), weights, used, scales)

    return init, update


def _hypers(b1: Any, b2: Any, nu_rule: Any, nu_eps: Any, nu_init: Any) -> dict[str, Hyperparameter]:
    """What the state keeps a record of; where ν starts, too, if not at 0, for `reset`, which sees the state alone."""
    hypers = {name: Hyperparameter(name, b, "[0, 1)") for name, b in [("b1", b1), ("b2", b2)] if b is not None}
    if nu_rule in ("belief", "infinity"):
        hypers["nu_eps"] = Hyperparameter("nu_eps", nu_eps, "[0, inf)")
    start = Hyperparameter("nu_init", nu_init, "[0, inf)")
    at_zero = isinstance(nu_init, (int, float)) and nu_init == 0
    return hypers if b2 is None or at_zero else hypers | {"nu_init": start}


def _check_options(b1: Any, b2: Any, mu_rule: Any, nu_rule: Any, blocks: Any) -> None:
    """Refuses what `track_moments` cannot do."""
    expect_one_of("mu_rule", mu_rule, ("mean", "sum"))
    expect_one_of("nu_rule", nu_rule, tuple(NU_RULES))
    if not callable(blocks):
        expect_one_of("blocks", blocks, (None, "leaf", "output"))
    if b1 is None and b2 is None:
        raise ValueError("track_moments: found None for both b1 and b2; expected at least one decay: there is nothing to track.")
    if b1 is None and nu_rule == "belief":
        raise ValueError("track_moments: found nu_rule='belief' with b1=None; expected a decay b1: belief is |g − mu|.")


def _shared_shape(blocks: Blocks | None, path: Any, leaf: Any) -> tuple[int, ...]:
    """The shape of a leaf's ν: 1 along every axis that a block spans."""
    shape = jnp.shape(leaf)
    if blocks is None:
        return shape
    all_but_last = tuple(range(len(shape) - 1))
    whole = tuple(range(len(shape)))
    axes = blocks(jax.tree_util.keystr(path), shape) if callable(blocks) else whole if blocks == "leaf" else all_but_last
    if not all(-len(shape) <= axis < len(shape) for axis in axes):
        raise ValueError(f"blocks: found the axes {axes} for {jax.tree_util.keystr(path)} of shape {shape}; expected its own.")
    shared = {axis % len(shape) for axis in axes}
    return tuple(1 if axis in shared else size for axis, size in enumerate(shape))
