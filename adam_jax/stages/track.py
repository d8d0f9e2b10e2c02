"""`track_moments`: the first stage of every optimizer.

A moment is an exponential average that starts at zero, so its weights add up to less than 1. The
debias factor is their sum: the same average of the constant 1. Later stages divide by it. They need
no decay and no count, and stay right when the decay changes from step to step.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from adam_jax._core.arithmetic import make_ema, multiply, widen
from adam_jax._core.boxes import in_boxes_of
from adam_jax._core.context import Context
from adam_jax._core.decorators import stage
from adam_jax._core.errors import brief, expect_one_of
from adam_jax._core.hyperparams import (
    Hyperparameter,
    Hyperparameters,
    ScalarOrSchedule,
    cast,
    complement,
    increment,
)
from adam_jax._core.leaves import PyTree, as_wide_as, like_params, scalar_dtype
from adam_jax._core.lift import lift
from adam_jax._core.spec import Definition
from adam_jax.stages.blocks import Blocks, block_mean, expect_blocks, first_nu
from adam_jax.stages.moments import Moments, accumulate_weight, per_leaf
from adam_jax.stages.rules import NU_RULES, STATES, nu_of_gradient
from adam_jax.stages.saturation import limit_gradients
from adam_jax.storage.formats import Storage, canonical, resolve_storage
from adam_jax.storage.random_bits import StepBits
from adam_jax.storage.slot import MomentSlot
from adam_jax.storage.slots import all_first_scales, all_narrow


@stage(takes="updates", gives="moments", canonical={"storage": canonical})
def track_moments(  # noqa: PLR0915  (one stage, read from top to bottom)
    b1: ScalarOrSchedule | None = 0.9,
    b2: ScalarOrSchedule | None = 0.999,
    *,
    mu_rule: Literal["mean", "sum"] = "mean",
    nu_rule: Literal["square", "belief", "yogi", "infinity"] = "square",
    nu_eps: ScalarOrSchedule = 0.0,
    nu_init: float = 0.0,
    nu_delay: bool = False,
    debias: bool = True,
    blocks: Blocks | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    storage: Storage = "float32",
) -> Definition:
    """Averages the gradients and their squares.

        mu ← mu + (1 − b1)·(g − mu)          mu_weight ← mu_weight + (1 − b1)·(1 − mu_weight)
        nu ← nu + (1 − b2)·(|g|² − nu)       nu_weight ← nu_weight + (1 − b2)·(1 − nu_weight)

    Gradients are widened to float32 first (float64 and complex stay), so the state never has a
    half-precision dtype unless it is asked for. Beyond ±2⁶² (4.6e18, in float32) they saturate,
    infinities too, so that ν never overflows. A NaN is not hidden: it makes the moments, and so the
    parameter, of its element NaN for good (8-bit moments forget it, the parameter does not).

    Args:
      b1: decay of the first moment, in [0, 1); `None` tracks none, and `mu` is the gradient.
      b2: decay of the second moment, in [0, 1); `None` tracks none.
      mu_rule: "mean", or "sum" for mu ← b1·mu + g, the heavy ball that other frameworks call
        momentum. It has weight 1.
      nu_rule: how ν moves. "square" averages |g|² (Adam), "belief" |g − mu|² and adds nu_eps
        (AdaBelief), "yogi" steps towards |g|² by (1 − b2)·|g|² at most, "infinity" takes
        max(b2·nu, |g| + nu_eps), whose weight is 1 (AdaMax).
      nu_eps: what the rules "belief" and "infinity" add at every step, ≥ 0.
      nu_init: where ν starts, ≥ 0.
      nu_delay: hand on the ν of the step before, which has not seen this gradient. The first step
        only fills ν: its β₂ is 0 and the gradient that it hands on is zero.
      debias: keep the weights that `correct_bias` divides by. Without, it is refused behind this
        stage.
      blocks: which axes of a leaf share one ν: "leaf" for all, "output" for all but the last (the
        outputs of a Flax kernel), or a function (path as `jax.tree_util.keystr` writes it, shape)
        -> axes. `None` shares none.
      mu_dtype: the floating dtype in which every leaf of `mu` rests between steps, however small;
        `storage=` for the habit of Optax. Complex leaves stay as they are. `None`: as `storage` has
        it.
      nu_dtype: the same for `nu`.
      storage: how the moments rest: "float32" (or wider, as they are computed), "bfloat16", "8bit",
        an object of `adam_jax.storage`, or a pair (for mu, for nu). The update of a step uses the
        moments before they are narrowed.

    Raises:
      ValueError: for a number outside its range, an unknown rule or storage, or a dtype beside a
        storage that says otherwise; in `update`, for a gradient tree that does not fit, a state
        that rests otherwise, or a derivative that is taken through a moment as it is stored in
        fewer bits than float32: rounding has none.
      TypeError: for what is no number, no scalar and no schedule.

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization" (2015), Algorithm 1 and §3.
    """
    hypers = _hypers(b1, b2, nu_rule, nu_eps, nu_init)
    _check_options(b1, b2, mu_rule, nu_rule, blocks)
    expect_one_of("debias", debias, (True, False))
    rule = NU_RULES[nu_rule]
    mu_form, nu_form = resolve_storage(storage, mu_dtype, nu_dtype)
    slots = []
    if b1 is not None:
        gathers = mu_rule == "mean" and debias
        named = "trace" if mu_rule == "sum" else "mu"
        slots.append(
            MomentSlot(
                "mu",
                mu_form,
                meaning=f"the {mu_rule} of {{}}",
                gathers=gathers,
                whole=mu_rule == "sum",
                decay="b1",
                kind=named,
                label="μ",
            )
        )
    if b2 is not None:
        gathers = (rule.weighs and debias) or nu_delay
        slots.append(
            MomentSlot(
                "nu",
                nu_form,
                signed=False,
                turn=16,
                start=nu_init,
                meaning=rule.meaning,
                gathers=gathers,
                whole=not rule.weighs,
                decay="b2",
                label="ν",
                delayed=nu_delay,
                kind=nu_rule if nu_rule in ("belief", "infinity") else "nu",
                of_gradient=functools.partial(nu_of_gradient, rule),
            )
        )
    columns = [slot.name for slot in slots if slot.gathers]
    delayed = "Delayed" if nu_delay else ""
    kind = STATES["" if b1 is None else mu_rule.title(), "" if b2 is None else delayed + rule.name]

    def init(params: PyTree) -> Any:
        scalars = scalar_dtype(params)
        kept = {
            slot.name: slot.init(params) if slot.name == "mu" else first_nu(blocks, slot, params)
            for slot in slots
        }
        scales = all_first_scales(slots, kept)
        weights = jnp.zeros((2, len(columns)), scalars) if columns else None
        return kind(jnp.zeros((), jnp.int32), *kept.values(), weights, hypers.kept(scalars), scales)

    def update(grads: Any, state: Any, params: Any, context: Context) -> tuple[Moments, Any]:
        scalars = scalar_dtype(grads) if state.weights is None else state.weights.dtype
        values = hypers.at(state.count, state.hyperparams)
        count = increment(state.count)
        later = hypers["b1"].at(count, state.hyperparams) if b1 is not None else 0.0
        used = {name: cast(value, scalars) for name, value in values.items()}
        zero, one = jnp.zeros((), scalars), jnp.ones((), scalars)
        mu_decay, mu_rate = (
            (zero, one) if b1 is None else (used["b1"], complement(values["b1"], scalars))
        )
        nu_decay, nu_rate = (
            (zero, one) if b2 is None else (used["b2"], complement(values["b2"], scalars))
        )
        mu_rate = one if mu_rule == "sum" else mu_rate
        if nu_delay:
            first = state.weights[0, columns.index("nu")] == 0
            nu_decay, nu_rate = jnp.where(first, zero, nu_decay), jnp.where(first, one, nu_rate)
            firsts = per_leaf(first)

        shares, boxed = blocks is not None and b2 is not None, state
        if shares:  # ν is in boxes of its own, which name fewer axes
            trained = like_params(lambda g: g, grads)
            state = state._replace(nu=in_boxes_of(state.nu, trained))
        old = {"mu": None, "nu": None} | {
            slot.name: slot.widen(getattr(state, slot.name), state.scales) for slot in slots
        }
        if b2 is not None:
            expect_blocks(blocks, grads, state.nu)
        if columns and state.weights.shape[:2] != (2, len(columns)):
            raise ValueError(
                f"track_moments: found weights of shape {state.weights.shape} in the state; "
                f"expected (2, {len(columns)}), or more axes behind these. Pass the state that "
                "`init` or `update` returned."
            )
        grads = limit_gradients(grads, state, slots, rule, nu_rate)
        mu_average = make_ema(values.get("b1", 0.0), mu_decay, mu_rate)
        nu_decays, nu_rates = per_leaf(nu_decay), per_leaf(nu_rate)

        def moment(g: Array, mu: Array | None) -> Array:
            if mu is None:
                # g − g is 0, and NaN where g is NaN: it has to reach the parameter even if codes
                # store it as 0.
                return jnp.where(firsts(), jax.lax.sub(g, g), g) if nu_delay else g
            mu = mu.astype(g.dtype)
            return multiply(mu, mu_decay) + g if mu_rule == "sum" else mu_average(mu, g)

        def second_moment(g: Array, mu: Array, nu: Array) -> Array:
            seen = block_mean(rule.sees(g, mu), nu.shape)
            nu = nu.astype(seen.dtype)
            decay, rate = nu_decays(), nu_rates()
            average = make_ema(values.get("b2", 0.0), decay, rate)
            return rule.moves(
                nu,
                seen,
                average,
                *(s.astype(nu.dtype) for s in (decay, rate, used.get("nu_eps", zero))),
            )

        def leaf(grad: Any, mu: Array | None, nu: Array | None) -> tuple[Array, Array | None]:
            g = widen(grad)
            mu = moment(g, mu)
            return mu, None if nu is None else second_moment(g, mu, nu)

        shared = () if blocks is None else ("nu",)
        grads = lift(
            as_wide_as, grads, free=shared, **old
        )  # a float32 gradient would turn float64 moments into float32 ones
        mu, nu = lift(leaf, grads, outputs=2, free=shared, **old)
        kept, scales = all_narrow(
            slots,
            {"mu": mu, "nu": nu},
            state,
            StepBits(context.stream("track_moments"), count),
            context.selector,
        )
        if shares:
            kept["nu"] = in_boxes_of(kept["nu"], boxed.nu)
        nu = nu if b2 is not None else None
        weights, gathered = None, dict[str, Array]()
        if columns:
            rates = {"mu": mu_rate, "nu": nu_rate if rule.weighs else one}
            weights = accumulate_weight(
                state.weights,
                jnp.stack(
                    [jnp.broadcast_to(rates[name], state.weights.shape[2:]) for name in columns]
                ),
            )
            gathered = {name: weights[0, i] for i, name in enumerate(columns)}
        # A gradient, a sum and a maximum are whole at once.
        whole = {
            "mu": b1 is None or mu_rule == "sum",
            "nu": b2 is None or nu_delay or not rule.weighs,
        }
        moments = Moments(
            grad=grads,
            mu=mu,
            nu=old["nu"] if nu_delay else nu,
            mu_weight=one if whole["mu"] else gathered.get("mu"),
            nu_weight=one if whole["nu"] else gathered.get("nu"),
            mu_decay=mu_decay,
            mu_rate=mu_rate,
            nu_rate=nu_rate,
            count=count,
            next_mu_decay=cast(later, scalars),
            next_mu_rate=complement(later, scalars),
        )
        return moments, kind(count, *kept.values(), weights, state.hyperparams, scales)

    return Definition(init, update, tuple(slots), hypers, counter="count")


def _hypers(b1: Any, b2: Any, nu_rule: Any, nu_eps: Any, nu_init: Any) -> Hyperparameters:
    hypers = [
        Hyperparameter(name, b, "[0, 1)") for name, b in [("b1", b1), ("b2", b2)] if b is not None
    ]
    if nu_rule in ("belief", "infinity"):
        hypers.append(Hyperparameter("nu_eps", nu_eps, "[0, inf)"))
    start = Hyperparameter("nu_init", nu_init, "[0, inf)")
    if start.scheduled or start.settable:
        raise TypeError(
            f"track_moments: nu_init: found {brief(nu_init)}; expected a number: it is where ν "
            "starts, once."
        )
    return Hyperparameters(*hypers)


def _check_options(b1: Any, b2: Any, mu_rule: Any, nu_rule: Any, blocks: Any) -> None:
    """Refuses what `track_moments` cannot do."""
    expect_one_of("mu_rule", mu_rule, ("mean", "sum"))
    expect_one_of("nu_rule", nu_rule, tuple(NU_RULES))
    if not callable(blocks):
        expect_one_of("blocks", blocks, (None, "leaf", "output"))
    if b1 is None and b2 is None:
        raise ValueError(
            "track_moments: found None for both b1 and b2; expected at least one decay."
        )
    if b1 is None and nu_rule == "belief":
        raise ValueError(
            "track_moments: found nu_rule='belief' with b1=None; expected a decay b1: belief is "
            "|g − mu|."
        )
