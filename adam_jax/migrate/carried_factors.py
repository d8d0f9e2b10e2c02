"""The debias factors that moments bring along, and what follows from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._core.configuration import StageInstance
from adam_jax._core.spec import Follower
from adam_jax.migrate.factors import factor_of, is_whole, rate_of, scalars_of, spread, together
from adam_jax.migrate.pairing import Pair, Pairing, Source
from adam_jax.migrate.report import Report, entry_of
from adam_jax.stages.moments import accumulate_weight


class Tracked(NamedTuple):
    """The moments of the last stage that made any, on their way to the new configuration.

    Attributes:
      sources: where the leaves of each moment come from.
      factors: the debias factors of "mu" and "nu", as two floats: shape (2,), or (2, leaves).
    """

    sources: dict[str, list[Source | None]]
    factors: dict[str, Array]


def beside_mu(pair: Pair, field: str) -> np.ndarray:
    """Returns which leaves have a fresh ν, from which the next update is made, beside a kept μ."""
    sources = pair.sources.get(field, ())
    if field != "nu" or "mu" not in pair.sources or pair.stage.slots["nu"].delayed:
        return np.zeros(len(sources), bool)
    both = zip(pair.sources["mu"], sources, strict=True)
    return np.array([mu is not None and nu is None for mu, nu in both], bool)


def nu_rate(stage: StageInstance, count: Array | None) -> Array:
    """Returns 1 − b2 at the step that the run has reached."""
    return rate_of(stage, "nu", jnp.zeros((), jnp.int32) if count is None else count)


# Debias factors, and what follows from them


def carried_factors(pair: Pair, count: Array | None) -> dict[str, Array]:
    """Returns the debias factors of μ and ν, with an entry per leaf where leaves differ."""
    both = {name: _column(pair, name, count) for name in ("mu", "nu")}
    leaves: tuple[int, ...] = max((factor.shape[1:] for factor in both.values()), key=len)
    return {name: spread(factor, 1, leaves) for name, factor in both.items()}


def _column(pair: Pair, field: str, count: Array | None) -> Array:
    """Returns the debias factor of one moment, for all leaves or one per leaf.

    If the stage does not keep that moment, the factor comes from the stage that its other moment
    comes from.
    """
    stage, factor = pair.stage, _gathered(pair, field)
    if field not in stage.meanings:
        return factor
    none, slot = jnp.zeros(2, factor.dtype), stage.slots[field]
    beside = beside_mu(pair, field)
    if beside.any():
        counts = slot.gathers or not is_whole(stage, field)
        rate = nu_rate(stage, count) if counts else jnp.ones_like(none[0])
        mu = _gathered(pair, "mu")
        one = accumulate_weight(none, rate).reshape(2, *[1] * (mu.ndim - 1))
        seen = jnp.where(mu[0] > 0, one, jnp.zeros_like(mu))
        if beside.all():
            factor = seen
        else:
            wide = [x if x.ndim > 1 else x[:, None] for x in (seen, factor)]
            factor = jnp.where(jnp.asarray(beside), wide[0], wide[1])
    if slot.delayed:
        factor = jnp.stack([(factor[0] > 0).astype(none.dtype), jnp.zeros_like(factor[1])])
    return factor


def _gathered(pair: Pair, field: str) -> Array:
    """Returns the debias factor that a moment brings along, one or one per leaf."""
    none = jnp.zeros(2, scalars_of(pair.stage))
    sources = next(pair.sources[name] for name in (field, "mu", "nu") if name in pair.sources)
    if not sources and pair.partner is not None:
        return factor_of(pair.partner, field, 0)  # a group without leaves has counted all the same
    made: dict[Any, Array] = {}  # leaves that have one factor in common get the same array

    def factor(source: Source) -> Array:
        factors = source.stage.state.weights
        per_leaf = factors is not None and factors.ndim > 2
        key = source.stage.key, source.row if per_leaf else None
        if key not in made:
            made[key] = source._replace(field=field).factor
        return made[key]

    return together([none if source is None else factor(source) for source in sources], none)


def following(
    pair: Pair, pairing: Pairing, field: str, follower: Follower, tracked: Tracked | None
) -> tuple[Array | None, Report]:
    """Returns a number that follows from a debias factor.

    It is that of the stage which did the same for the leaf before, or is computed from the factor.
    """
    none = getattr(pair.stage.state, field)
    if none is None or tracked is None:
        return none, Report()
    factor = tracked.factors[follower.moment].astype(none.dtype)
    values, notes = [], {}
    made: dict[Any, Array] = {}  # leaves that have one number in common get the same array
    for i, source in enumerate(tracked.sources.get(follower.moment, ())):
        there = None if source is None else pairing.stages.get(key_there(pair.stage, source))
        known = None if there is None else getattr(there.state, field)
        if source is not None:
            notes["" if known is not None else f"from the weight of {_SIGN[follower.moment]}"] = (
                True
            )
        if source is not None and known is not None:
            values.append(source.own(known, follower.ndim))
            continue
        key = source and source.stage.place, i if factor.ndim > 1 else None
        if key not in made:
            own = factor if factor.ndim == 1 else factor[:, i]
            made[key] = follower.of_factor(own, *_history(source, follower.moment, none.dtype))
        values.append(made[key])
    entries = [entry_of(pair.stage, field, follower.meaning, "".join(notes))] if notes else []
    value = spread(together(values, none), follower.ndim, factor.shape[1:])
    return value, Report(tuple(entries))


_SIGN = {"mu": "μ", "nu": "ν"}


def _history(source: Source | None, moment: str, dtype: Any) -> tuple[Array, Array]:
    """Returns 1 − the decay of a leaf's moment at its last step, and its steps.

    A fresh leaf has taken one step at most, whose decay does not matter.
    """
    if source is None:
        return jnp.asarray(0.5, dtype), jnp.ones((), jnp.int32)
    steps = source.stage.state.count
    return rate_of(source.stage, moment, jnp.maximum(steps - 1, 0)).astype(dtype), steps


def key_there(stage: StageInstance, source: Source) -> Any:
    """Returns the key of the stage that did for a leaf, where it comes from, what `stage` does."""
    name, _, nth = stage.key
    return name, source.stage.group, nth
