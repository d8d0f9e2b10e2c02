"""Fills the states of a new configuration from an old one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adam_jax._core.arithmetic import divide
from adam_jax._core.configuration import INSIDE, StageInstance, gathering, moment_states
from adam_jax._core.leaves import PyTree
from adam_jax._core.paths import names
from adam_jax._core.spec import show
from adam_jax._core.transformation import Transformation
from adam_jax.migrate.carried_factors import (
    Tracked,
    beside_mu,
    carried_factors,
    following,
    key_there,
    nu_rate,
)
from adam_jax.migrate.pairing import Pair, Pairing, Source, alike
from adam_jax.migrate.report import Entry, Report, entry_of, if_not_all
from adam_jax.stages.blocks import block_mean
from adam_jax.storage.stored_leaf import StoredLeaf, repack_moment, unpack_moment


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
            tracked = Tracked(pair.sources, carried_factors(pair, count))
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
            new[field], entries = following(pair, pairing, field, follower, tracked)
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
    where = names(tree)
    beside = beside_mu(pair, field)
    leaves, notes = [], []
    for i, start in enumerate(unpack_moment(stage.slots[field], tree, scales)):
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
    missing = [path for path, source in zip(where, sources, strict=True) if source is None]
    if missing:
        notes = [if_not_all(missing, where)]
        notes += [
            f"{moment.stage.place}.{field} was {moment.stage.meanings[field]}"
            for moment in pairing.moments
            if moment.field == field
            and moment.leaves.keys() & missing
            and moment.stage.meanings[field] != stage.meanings[field]
        ]
        notes += ["as if μ had been one gradient"] if beside.any() else []
        fresh.append(entry_of(stage, field, note="; ".join(filter(None, notes))))
    tree, scales = repack_moment(stage.slots[field], tree, scales, leaves)
    return tree, scales, Report(tuple(kept), tuple(fresh))


def _moved(
    source: Source, like: StoredLeaf, stage: StageInstance, field: str
) -> tuple[StoredLeaf, list[str]]:
    """Returns a leaf as `stage` stores it, and what was done to it."""
    array, start = source.stored.array, like.array
    whole = stage.slots[field].delayed and not source.stage.slots[source.field].delayed
    shared, sharing = (None if s is None else s.shape for s in (source.stored.scale, like.scale))
    if array.shape == start.shape and source.stored.same_storage(like) and not whole:
        return like._replace(array=array, scale=source.stored.scale), []
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
    return like.storing(x), notes


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
    made = make(g, nu, nu_rate(pair.stage, count).astype(nu.dtype))
    return start.storing(made)


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
    if not same and any(moment_states(other.state) for other in others):
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
        key_there(pair.stage, source)
        for pair in pairing.pairs
        if pair.stage.definition is not None and pair.stage.definition.follows
        for moment in pairing.moments
        for source in moment.leaves.values()
    }
    for stage in pairing.unpaired:
        if not isinstance(stage.tx, Transformation):
            if moment_states(stage.state):
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
