"""Fills the states of a new configuration from an old one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._core.arithmetic import divide
from adam_jax._core.configuration import INSIDE, StageInstance, gathering
from adam_jax._core.leaves import PyTree
from adam_jax._core.paths import paths
from adam_jax._core.spec import Follower, show
from adam_jax._core.transformation import Transformation
from adam_jax.migrate.factors import is_whole, rate_of, scalars_of, spread, together
from adam_jax.migrate.pairing import Pair, Pairing, Source, alike
from adam_jax.migrate.report import Entry, Report, entry_of, if_not_all
from adam_jax.stages.blocks import block_mean
from adam_jax.stages.moments import accumulate_weight
from adam_jax.storage.stored_leaf import (
    StoredLeaf,
    narrow_to_nearest,
    repack_moment,
    unpack_moment,
)


class Tracked(NamedTuple):
    """The moments of the last stage that made any, on their way to the new configuration.

    Attributes:
      sources: where the leaves of each moment come from.
      factors: the debias factors of "mu" and "nu", as two floats: shape (2,), or (2, leaves).
    """

    sources: dict[str, list[Source | None]]
    factors: dict[str, Array]


def fill_all(pairing: Pairing, count: Array | None) -> tuple[list[Any], Report]:
    """Returns the states of all stages of the new configuration, and what became of what.

    Args:
      pairing: how the configurations belong together.
      count: the step that the run has reached; `None` if nothing counts steps.
    """
    states, report = [], Report()
    tracked: Tracked | None = None
    for pair in pairing.pairs:
        if "weights" in getattr(pair.stage.state, "_fields", ()):
            tracked = Tracked(pair.sources, _factors(pair, count))
        state, entries = _fill(pair, pairing, count, tracked)
        states.append(state)
        report |= entries
    return states, report


def _fill(
    pair: Pair, pairing: Pairing, count: Array | None, tracked: Tracked | None
) -> tuple[Any, Report]:
    """Returns the state of one stage."""
    stage, partner = pair.stage, pair.partner
    if not isinstance(stage.tx, Transformation):
        return _foreign(pair)
    if not hasattr(stage.state, "_fields"):
        if partner is None:
            return stage.state, Report()
        return _other(pair, "", stage.state, partner.state)
    assert stage.definition is not None
    new: dict[str, Any] = {}
    scales, report = getattr(stage.state, "scales", {}), Report()
    for field, value in stage.state._asdict().items():
        theirs = getattr(partner.state, field, None) if partner else None
        if field in stage.meanings:
            new[field], scales, entries = _moment(pair, pairing, field, scales, count)
            report |= entries
        elif field == stage.definition.counter:
            reached = count if theirs is None else theirs
            new[field] = value if value is None or reached is None else reached
        elif field == "hyperparams":
            kept = theirs or {}
            new[field] = {
                name: jnp.asarray(kept.get(name, v)).astype(v.dtype) for name, v in value.items()
            }
        elif field == "weights":
            assert tracked is not None
            factors = [tracked.factors[name] for name in gathering(stage.tx)]
            new[field] = None if value is None else jnp.stack(factors, axis=1)
        elif field in stage.definition.follows:
            follower = stage.definition.follows[field]
            new[field], entries = _following(pair, pairing, field, follower, tracked)
            report |= entries
        elif field not in INSIDE:
            new[field], entries = _other(pair, field, value, theirs)
            report |= entries
    if "scales" in stage.state._fields:
        new["scales"] = scales
    return stage.state._replace(**new), report


# Moments


def _moment(
    pair: Pair, pairing: Pairing, field: str, scales: Any, count: Array | None
) -> tuple[PyTree, Any, Report]:
    """Returns a stored moment and the scales of its state.

    Each leaf comes from the one of the same meaning, wherever that was.
    """
    stage, sources = pair.stage, pair.sources[field]
    tree = getattr(stage.state, field)
    names = paths(tree)
    beside = _beside_mu(pair, field)
    leaves, notes = [], []
    for i, start in enumerate(unpack_moment(field, tree, scales)):
        source = sources[i]
        if source is not None:
            leaf, done = _moved(source, start, stage, field)
            notes += done
        else:
            leaf = _nu_of_mu(pair, i, start, count) if beside[i] else start
        leaves.append(leaf)
    kept, fresh = [], []
    if any(sources) or not sources:
        origins = [f"from {source.stage.place}.{field}" for source in sources if source]
        moved = [origin for origin in origins if origin != f"from {stage.place}.{field}"]
        kept.append(entry_of(stage, field, note=", ".join(dict.fromkeys(moved + notes))))
    missing = [path for path, source in zip(names, sources, strict=True) if source is None]
    if missing:
        notes = [if_not_all(missing, names)]
        notes += [
            f"{moment.stage.place}.{field} was {moment.stage.meanings[field]}"
            for moment in pairing.moments
            if moment.field == field
            and moment.leaves.keys() & missing
            and moment.stage.meanings[field] != stage.meanings[field]
        ]
        notes += ["as if μ had been one gradient"] if beside.any() else []
        fresh.append(entry_of(stage, field, note="; ".join(filter(None, notes))))
    tree, scales = repack_moment(field, tree, scales, leaves)
    return tree, scales, Report(tuple(kept), tuple(fresh))


def _moved(
    source: Source, like: StoredLeaf, stage: StageInstance, field: str
) -> tuple[StoredLeaf, list[str]]:
    """Returns a leaf as `stage` stores it, and what was done to it."""
    array, start = source.stored.array, like.array
    whole = stage.slots[field].delayed and not source.stage.slots[source.field].delayed
    shared, sharing = (None if s is None else s.shape for s in (source.stored.scale, like.scale))
    same = array.dtype == start.dtype and array.shape == start.shape and shared == sharing
    if same and not whole:
        return source.stored, []
    x, notes = source.stored.widen(), []
    if whole:
        x = divide(x, source.divisor)
        notes.append("divided by the weight it had gathered")
    if x.shape != start.shape:
        block = all(size in (1, old) for size, old in zip(start.shape, x.shape, strict=True))
        notes.append("the mean over each block" if block else "spread over its block")
        x = jnp.broadcast_to(block_mean(x, start.shape), start.shape)
    if array.dtype != start.dtype:
        notes.append(f"{array.dtype} → {start.dtype}")
    elif array.shape == start.shape and shared != sharing:
        notes.append(f"scales of shape {shared} → {sharing}")
    return narrow_to_nearest(x, like, signed=stage.slots[field].signed), notes


def _beside_mu(pair: Pair, field: str) -> np.ndarray:
    """Returns which leaves have a fresh ν, from which the next update is made, beside a kept μ."""
    sources = pair.sources.get(field, ())
    if field != "nu" or "mu" not in pair.sources or pair.stage.slots["nu"].delayed:
        return np.zeros(len(sources), bool)
    both = zip(pair.sources["mu"], sources, strict=True)
    return np.array([mu is not None and nu is None for mu, nu in both], bool)


def _nu_of_mu(pair: Pair, i: int, start: StoredLeaf, count: Array | None) -> StoredLeaf:
    """Returns ν after a step whose gradient was μ, corrected for its bias.

    μ/√ν is bounded because both have seen the same gradients. With a ν that has seen only the next
    gradient the update would have no bound where that gradient happens to be small.
    """
    source, make = pair.sources["mu"][i], pair.stage.slots["nu"].of_gradient
    assert source is not None
    assert make is not None
    nu = start.widen()
    g = divide(source.stored.widen(), source.divisor)
    made = make(g, nu, _nu_rate(pair.stage, count).astype(nu.dtype))
    return narrow_to_nearest(made, start, signed=False)


def _nu_rate(stage: StageInstance, count: Array | None) -> Array:
    """Returns 1 − b2 at the step that the run has reached."""
    return rate_of(stage, "nu", jnp.zeros((), jnp.int32) if count is None else count)


# Debias factors, and what follows from them


def _factors(pair: Pair, count: Array | None) -> dict[str, Array]:
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
    beside = _beside_mu(pair, field)
    if beside.any():
        counts = slot.gathers or not is_whole(stage, field)
        rate = _nu_rate(stage, count) if counts else jnp.ones_like(none[0])
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
    made: dict[Any, Array] = {}  # leaves that have one factor in common get the same array

    def factor(source: Source) -> Array:
        factors = source.stage.state.weights
        per_leaf = factors is not None and factors.ndim > 2
        key = source.stage.key, source.row if per_leaf else None
        if key not in made:
            made[key] = source._replace(field=field).factor
        return made[key]

    return together([none if source is None else factor(source) for source in sources], none)


def _following(
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
        there = None if source is None else pairing.stages.get(_key_there(pair.stage, source))
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


def _key_there(stage: StageInstance, source: Source) -> Any:
    """Returns the key of the stage that did for a leaf, where it comes from, what `stage` does."""
    name, _, nth = stage.key
    return name, source.stage.group, nth


# Everything else


def _other(pair: Pair, field: str, value: Any, theirs: Any) -> tuple[Any, Report]:
    """Returns what a stage keeps that is no moment: its partner's, if that has the same form."""
    stage, partner = pair.stage, pair.partner
    if not jax.tree.leaves(value) and not jax.tree.leaves(theirs):
        return value, Report()
    if partner is not None and alike(theirs, value):

        def cast(x: Any, like: Any) -> Any:
            return x.astype(like.dtype) if hasattr(like, "dtype") else x

        return jax.tree.map(cast, theirs, value), Report(kept=(entry_of(stage, field),))
    misfit = partner is not None and jax.tree.leaves(theirs)
    return value, Report(
        fresh=(entry_of(stage, field),) if jax.tree.leaves(value) else (),
        misfits=(entry_of(partner, field, note="of another form in to_tx"),)
        if misfit and partner
        else (),
    )


def _foreign(pair: Pair) -> tuple[Any, Report]:
    """Returns the state of a transformation of another library."""
    stage, partner = pair.stage, pair.partner
    same = partner is not None and stage.tx == partner.tx
    others = [other for other in (stage, partner, pair.misfit) if other is not None]
    if not same and any(holds_moments(other.state) for other in others):
        raise ValueError(hidden(stage, "to_tx"))
    if not jax.tree.leaves(stage.state):
        return stage.state, Report()
    entry = (Entry(stage.place, f"the state of {show(stage.tx)}"),)
    if partner is not None:
        return partner.state, Report(kept=entry)
    return stage.state, Report(fresh=entry)


def dropped(pairing: Pairing) -> tuple[Entry, ...]:
    """Returns what of the old configuration no stage of the new one took.

    Raises:
      ValueError: if moments are inside a transformation of another library.
    """
    found = [
        entry_of(moment.stage, moment.field, note=if_not_all(moment.left, moment.leaves))
        for moment in pairing.moments
        if moment.left
    ]
    served = {
        _key_there(pair.stage, source)
        for pair in pairing.pairs
        if pair.stage.definition is not None and pair.stage.definition.follows
        for moment in pairing.moments
        for source in moment.leaves.values()
    }
    for stage in pairing.unpaired:
        if not isinstance(stage.tx, Transformation):
            if holds_moments(stage.state):
                raise ValueError(hidden(stage, "from_tx"))
            if jax.tree.leaves(stage.state):
                found.append(Entry(stage.place, f"the state of {show(stage.tx)}"))
            continue
        found += [entry_of(stage, field) for field in _kept_besides(stage, stage.key in served)]
    return tuple(found)


def _kept_besides(stage: StageInstance, served: bool) -> Sequence[str]:
    """Returns the fields of a stage that are no moments and do not follow from others."""
    assert stage.definition is not None
    known = {*INSIDE, *stage.meanings, stage.definition.counter, "hyperparams", "weights"}
    known |= {*stage.definition.follows} if served else set()
    state = stage.state
    fields = [field for field in getattr(state, "_fields", ()) if field not in known]
    return [field for field in fields if jax.tree.leaves(getattr(state, field))]


def holds_moments(state: Any) -> bool:
    """Whether moments of this package are somewhere in a state."""

    def is_stage(node: Any) -> bool:
        return isinstance(getattr(node, "scales", None), dict)

    return any(map(is_stage, jax.tree.leaves(state, is_leaf=is_stage)))


def hidden(stage: StageInstance, side: str) -> str:
    """Returns what the error says where another library's transformation hides moments."""
    at = f" at {stage.place}" if stage.place else ""
    return (
        f"convert_state: {show(stage.tx)}{at} of {side} has moments inside and does not show what "
        "they mean, and the other side does not have the same one. Convert the state inside it, "
        "for example state._replace(inner_state=convert_state(state.inner_state, from_tx, to_tx, "
        "params).state) with the transformations and the parameters that are inside, or build both "
        "with adam_jax.chain."
    )
