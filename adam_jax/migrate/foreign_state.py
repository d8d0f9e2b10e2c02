"""What a state remembers, by kind: read out for another library, or filled in from one.

Other libraries keep moments and a count. What we keep besides, weights, ages, records of
hyperparameters, follows from the count and the transformation alone: it is what a run of as many
steps has, whatever its gradients were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from adam_jax._core.configuration import Configuration, StageInstance, gathering, rebuilt
from adam_jax._core.errors import some
from adam_jax._core.leaves import PyTree, as_wide, takes_part
from adam_jax._core.paths import by_its_path
from adam_jax._core.spec import show
from adam_jax._core.transformation import Transformation, expect_transformation
from adam_jax.migrate.counted import after_steps, entry_per_leaf
from adam_jax.migrate.kinds import kind_of
from adam_jax.migrate.owned import owned
from adam_jax.storage.stored_leaf import repack_moment, unpack_moment


class Memory(NamedTuple):
    """A moment of a transformation: the part that has it, and its field there."""

    part: StageInstance
    field: str

    @property
    def leaves(self) -> dict[str, Any]:
        """As they rest, by path."""
        return by_its_path(getattr(self.part.state, self.field))


class ForeignState(NamedTuple):
    """What other libraries keep of a run.

    Attributes:
      count: the steps that the moments of each leaf have taken, by path, or those of all.
      step: the steps that schedules have taken.
      moments: by kind and path, float32 or wider.
      ahead: the weight that a look ahead divides by, if there is one; on the way in it follows.
    """

    count: Any
    step: Any
    moments: Mapping[str, Mapping[str, Any]]
    ahead: float | None = None


def memories(
    tx: Any, state: Any, caller: str
) -> tuple[list[StageInstance], dict[str, list[Memory]]]:
    """The parts of a transformation, and its moments by kind: one for each group of `by_path`.

    Raises:
      TypeError: for what is no transformation.
      ValueError: where there are no moments, or two of one kind for a leaf.
    """
    expect_transformation(tx, caller)
    try:
        parts = Configuration(tx, state).stages
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{caller}: found a state that is not one of {show(tx)}; expected that of the "
            "transformation which the run had."
        ) from error
    found: dict[str, list[Memory]] = {}
    for i, part in enumerate(parts):
        if part.slots.keys() != part.meanings.keys():
            raise ValueError(
                f"{caller}: found {type(part.state).__name__} at {part.place or 'the top'}; "
                f"expected the state of {show(part.tx)}, of the transformation which the run had."
            )
        for field in part.meanings:
            kind, memory = _kind(parts, i, field), Memory(part, field)
            for first in found.get(kind, ()):
                if first.leaves.keys() & memory.leaves.keys():
                    raise ValueError(
                        f"{caller}: tx has {kind_of(kind)} at {first.part.place} and at "
                        f"{part.place}; expected one. Move each part alone."
                    )
            found.setdefault(kind, []).append(memory)
    if not found and isinstance(tx, Transformation):
        raise ValueError(
            f"{caller}: {show(tx)} keeps no moments, so there is nothing to move: begin with "
            "tx.init(params)."
        )
    if not found:
        raise ValueError(
            f"{caller}: found no moments in {show(tx)}; expected a transformation of adam_jax. Of "
            "one inside a wrapper of others, give the one inside and its part of the state; build "
            "chains with adam_jax.chain."
        )
    return parts, found


def _kind(parts: Sequence[StageInstance], i: int, field: str) -> str:
    slot = parts[i].slots[field]
    kind = slot.kind or slot.name
    if kind == "trace" and "steps" in parts[i].meanings[field]:
        return "trace of steps"
    behind = [part for part in parts[i:] if part.group == parts[i].group]
    corrected_later = any(
        part.definition is not None and "nu" in part.definition.corrects for part in behind
    )
    return "raw nu_max" if kind == "nu_max" and corrected_later else kind


def decays(tx: Any, state: Any, caller: str) -> dict[str, dict[str, Any]]:
    """The decays of the moments by kind and path, as `tx` was given them."""
    _, found = memories(tx, state, caller)
    made: dict[str, Any] = {}
    for kind, its in found.items():
        for memory in its:
            name, definition = memory.part.slots[memory.field].decay, memory.part.definition
            if name and definition and memory.part.tx.interface.takes != "moments":
                decay = definition.hyperparameters[name].value
                made.setdefault(kind, {}).update(dict.fromkeys(memory.leaves, decay))
    return made


def same_kinds(ours: Mapping[str, Any], theirs: Mapping[str, str], caller: str, where: str) -> None:
    """Refuses moments that only one side has; `theirs` says of each kind where it is."""
    extra, missing = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    if extra or missing:
        says = [f"{where} has {kind_of(kind)} ({theirs[kind]}), which tx has not" for kind in extra]
        says += [f"tx has {kind_of(kind)}, which {where} has not" for kind in missing]
        raise ValueError(
            f"{caller}: {'; '.join(says)}. Give a tx whose moments are the same, and change to "
            "another later, with convert_state."
        )


def trained(tree: PyTree) -> dict[str, Any]:
    """The leaves that have moments, by path."""
    return {path: leaf for path, leaf in by_its_path(tree).items() if takes_part(leaf)}


def fill(tx: Any, params: PyTree, run: ForeignState, caller: str) -> PyTree:
    """The state of `tx` in a run that others began.

    Raises:
      ValueError: where a moment is missing, left over, or of another shape than its leaf's.
    """
    first = tx.init(params)
    parts, found = memories(tx, first, caller)
    its_count = (
        run.count if isinstance(run.count, Mapping) else dict.fromkeys(trained(params), run.count)
    )
    follows = {count: after_steps(parts, params, count) for count in {*its_count.values()} or {0}}
    filled: dict[int, dict[str, Any]] = {}
    for kind, its in found.items():
        theirs = run.moments[kind]
        same_leaves(theirs, all_leaves(its), f"{caller}: {kind_of(kind)}")
        for part, field in its:
            leaves = []
            slot, tree = part.slots[field], getattr(part.state, field)
            starts = unpack_moment(slot, tree, part.state.scales)
            for path, start in zip(Memory(part, field).leaves, starts, strict=True):
                x = as_wide(theirs[path])
                real = jnp.iscomplexobj(x) and not slot.signed
                leaves.append(start.storing(x.real if real else x))
            own = filled.setdefault(id(part), {"scales": part.state.scales})
            own[field], own["scales"] = repack_moment(slot, tree, own["scales"], leaves)

    leaves_of: dict[tuple[str, ...], list[str]] = {}
    for memory in (memory for its in found.values() for memory in its):
        leaves_of.setdefault(memory.part.group, list(memory.leaves))

    def states() -> Iterator[Any]:
        for part in parts:
            counts = [
                its_count[path]
                for path in leaves_of.get(part.group, its_count)
                if path in its_count
            ]
            longest = follows[max(counts, default=max(follows))].get(part.place, {})
            fields = {
                field: entry_per_leaf(field, value, counts, follows, part)
                for field, value in longest.items()
            }
            fields |= filled.get(id(part), {})
            if fields.get("step") is not None and part.tx.interface.takes == "updates":
                fields["step"] = jnp.asarray(run.step, jnp.int32)
            yield part.state._replace(**fields) if fields else part.state

    return owned(rebuilt(tx, states()), params, run.moments)


def read(tx: Any, state: PyTree, caller: str) -> ForeignState:
    """What other libraries keep of a run of ours.

    Raises:
      ValueError: where a count does not say what the moments have seen.
    """
    parts, found = memories(tx, state, caller)
    held = [memory for its in found.values() for memory in its]
    (count, *others) = {
        int(part.state.count): None for part, _ in held if "count" in part.state._fields
    }
    follows = after_steps(parts, getattr(held[0].part.state, held[0].field), count)
    for part in parts:
        if part.place not in follows or getattr(part.state, "weights", None) is None:
            continue
        weights, expected = (
            np.asarray(part.state.weights),
            np.asarray(follows[part.place]["weights"]),
        )
        if others or not np.allclose(weights[0].T, expected[0], rtol=1e-5):
            raise ValueError(
                f"{caller}: the moments at {part.place or 'the top'} have gathered weights that "
                f"{count} steps of tx do not give, as after `reset` or under another decay. Others "
                "keep a count alone, and cannot take them."
            )
    steps = [
        int(part.state.step)
        for part in parts
        if _applies_rate(part) and part.state.step is not None
    ]
    moments: dict[str, dict[str, Any]] = {kind: {} for kind in found}
    for kind, its in found.items():
        for memory in its:
            tree = getattr(memory.part.state, memory.field)
            slot = memory.part.slots[memory.field]
            stored = unpack_moment(slot, tree, memory.part.state.scales)
            moments[kind] |= {
                path: x.widen() for path, x in zip(memory.leaves, stored, strict=True)
            }
    ahead = [_ahead_of(part, held) for part in parts if ahead_field(part)]
    return ForeignState(count, steps[0] if steps else count, moments, ahead[0] if ahead else None)


def _applies_rate(part: StageInstance) -> bool:
    stage = isinstance(part.tx, Transformation) and not part.tx.init.spec.inner
    return stage and part.tx.interface.rate == "applies"


def ahead_field(part: StageInstance) -> str | None:
    """Returns the field of the number that a look ahead divides by; `None` for other stages.

    It is what follows from the debias factor of μ.
    """
    follows = part.definition.follows if part.definition else {}
    return next((field for field, follower in follows.items() if follower.moment == "mu"), None)


def _ahead_of(part: StageInstance, held: Sequence[Memory]) -> float:
    """The weight that a look ahead divides by: its own, or that of μ."""
    weight = getattr(part.state, ahead_field(part) or "")
    if weight is None:
        tracked = next(
            memory.part
            for memory in held
            if "mu" in gathering(memory.part.tx) and memory.part.group == part.group
        )
        weight = tracked.state.weights[:, gathering(tracked.tx).index("mu")]
    return float(np.asarray(weight, np.float64).sum())


def all_leaves(moments: Sequence[Any]) -> dict[str, Any]:
    """The leaves of a moment by path, of all groups that keep it."""
    return {path: leaf for moment in moments for path, leaf in moment.leaves.items()}


def same_leaves(found: Mapping[str, Any], expected: Mapping[str, Any], caller: str) -> None:
    """Refuses leaves that are missing, left over, or of another shape."""
    missing, extra = (
        [path for path in expected if path not in found],
        [path for path in found if path not in expected],
    )
    if missing or extra:
        says = [f"missing {some(missing)}"] if missing else []
        says += [f"left over {some(extra)}"] if extra else []
        raise ValueError(
            f"{caller}: {'; '.join(says)}; expected the leaves of the parameters that were "
            "trained, and no others."
        )
    for path, like in expected.items():
        if jnp.shape(found[path]) != like.shape:
            raise ValueError(
                f"{caller}: at {path} found the shape {jnp.shape(found[path])}; expected "
                f"{like.shape}."
            )
