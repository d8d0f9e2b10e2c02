"""A configuration is a transformation with a state.

This file lists its stages, and says what their moments mean.

What two configurations share is decided by what their moments mean, not by what these are called: ν
is a mean of squares in Adam, of (g − μ)² in AdaBelief, and a maximum in AdaMax, each in a field
`nu` of the same shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from adam_jax._core.slots import Slot
from adam_jax._core.spec import Definition, rewrapped, show, wrapped
from adam_jax._core.transformation import Transformation

INSIDE = ("inner_state", "inner_states", "scales")
"""The fields of states that hold other states, or the scales of moments."""


class StageInstance(NamedTuple):
    """A stage, a wrapper or a transformation of another library, in its place in a configuration.

    Attributes:
      place: where its state is, as `jax.tree_util.keystr` writes it.
      tx: the transformation.
      state: its state; that of a wrapper holds the states inside.
      group: the names of the groups of `by_path` around it, from the outermost on.
      key: its name, its group, and how many of that name come before in its group. Stages are
        paired by it.
      meanings: what its moments are, by field.
    """

    place: str
    tx: Any
    state: Any
    group: tuple[str, ...]
    key: tuple[str, tuple[str, ...], int]
    meanings: dict[str, str]

    @property
    def definition(self) -> Definition | None:
        """The definition that the stage declares.

        `None` for a transformation of another library.
        """
        return definition_of(self.tx)

    @property
    def slots(self) -> dict[str, Slot]:
        """Its moments, by field."""
        return slots_of(self.tx)


def definition_of(tx: Any) -> Definition | None:
    """Returns the definition that a stage declares.

    `None` for a transformation of another library.
    """
    return tx.init.spec.definition if isinstance(tx, Transformation) else None


def slots_of(tx: Any) -> dict[str, Slot]:
    """The moments of a stage, by field."""
    definition = definition_of(tx)
    return {slot.name: slot for slot in definition.slots} if definition else {}


def gathering(tx: Any) -> list[str]:
    """The moments of a stage whose weights its state has, in the order of the weights' columns."""
    return [name for name, slot in slots_of(tx).items() if slot.gathers]


def tracks(tx: Any) -> bool:
    """Whether a stage makes moments of gradients. Its counter is that of the stages behind it."""
    return isinstance(tx, Transformation) and tx.interface.tracks


def moment_states(state: Any) -> list[Any]:
    """Returns the states that keep moments of this package, wherever in a state they are."""

    def keeps(node: Any) -> bool:
        return isinstance(getattr(node, "scales", None), dict)

    return list(filter(keeps, jax.tree.leaves(state, is_leaf=keeps)))


def scalar_fields(tx: Any, state: Any) -> tuple[str, ...]:
    """Returns the places of the fields that hold nothing for each parameter.

    Such fields are the counts, the debias factors and the records of wrappers. What is inside of
    transformations of other libraries is not among them.
    """
    found = []
    for place, _, part, own in iter_stages(tx, state):
        definition = definition_of(part)
        if definition is not None:
            per_parameter = {slot.name for slot in definition.slots} | {*definition.trees, *INSIDE}
            names = [name for name in getattr(own, "_fields", ()) if name not in per_parameter]
            found += [f"{place}.{name}" for name in names]
    return tuple(found)


def iter_stages(
    tx: Any, state: Any, place: str = "", group: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[str, ...], Any, Any]]:
    """Yields place, group, transformation and state of each part of a configuration.

    The order is that in which updates meet the parts.

    A wrapper comes before what is inside.

    Raises:
      ValueError: if the state has other parts than the transformation.
    """
    if isinstance(tx, Transformation) and tx.init.spec.stages:
        for i, (part, its) in enumerate(zip(tx.stages, state, strict=True)):
            yield from iter_stages(part, its, f"{place}[{i}]", group)
        return
    yield place, group, tx, state
    for inside, name, part, its in wrapped(tx, state):
        yield from iter_stages(
            part, its, f"{place}{inside}", group if name is None else (*group, name)
        )


def rebuilt(tx: Any, states: Iterator[Any]) -> Any:
    """Returns the state of `tx` with that of each part, in the order of `iter_stages`.

    Taken from `states`.
    """
    if isinstance(tx, Transformation) and tx.init.spec.stages:
        return tuple(rebuilt(part, states) for part in tx.stages)
    own = next(states)
    inner = [rebuilt(part, states) for _, _, part, _ in wrapped(tx, own)]
    return rewrapped(tx, own, inner) if inner else own


def read_counters(tx: Any, state: Any) -> dict[str, str]:
    """Returns the counters that schedules read: the field by the place of the stage's state."""
    found: dict[str, str] = {}
    moments, counts = "", None
    where: tuple[str, ...] | None = None
    for place, group, part, own in iter_stages(tx, state):
        definition = definition_of(part)
        if group != where:
            moments, counts, where = "", None, group
        if definition is None:
            continue
        if tracks(part):
            moments, counts = place, definition.counter
        if definition.hyperparameters.scheduled:
            # A stage without a counter reads that of the moments.
            if definition.counter is None and counts is not None:
                found[moments] = counts
            elif definition.counter and getattr(own, definition.counter, None) is not None:
                found[place] = definition.counter
    return found


def with_inside(state: Any, new: Mapping[int, Any]) -> Any:
    """Returns a state in which some nodes are replaced.

    Nodes are given by their `id`.
    """
    return jax.tree.map(
        lambda node: new.get(id(node), node), state, is_leaf=lambda node: id(node) in new
    )


def applied_rates(tx: Any, state: Any) -> list[tuple[tuple[str, ...], Callable[[], Any]]]:
    """Returns a function for each learning rate that a step from this state applies.

    With the group of its stage.

    The functions return the rates. A stage that does not declare its one learning rate has none
    here.
    """
    found: list[tuple[tuple[str, ...], Callable[[], Any]]] = []
    for _, group, part, its in iter_stages(tx, state):
        if (
            isinstance(part, Transformation)
            and part.interface.rate == "applies"
            and not part.init.spec.inner
        ):
            definition = part.init.spec.definition
            count = getattr(its, definition.counter, None) if definition.counter else None
            if len(definition.hyperparameters) == 1:
                (rate,) = definition.hyperparameters.values()
                found.append(
                    (group, functools.partial(rate.at, count, getattr(its, "hyperparams", {})))
                )
    return found


def of_group(group: tuple[str, ...]) -> str:
    """Returns how a message names a group."""
    return f" of {'/'.join(group)!r}" if group else ""


class Configuration:
    """A transformation with a state: its stages, and what their moments mean."""

    def __init__(self, tx: Any, state: Any) -> None:
        self.stages: list[StageInstance] = []
        names: list[tuple[str, tuple[str, ...]]] = []
        source, nu, corrected = "gradients", "", False
        where: tuple[str, ...] = ()
        for place, group, part, its in iter_stages(tx, state):
            if group != where:
                where, source, nu, corrected = group, "gradients", "", False
            definition = definition_of(part)
            # The interface of a wrapper is that of what is inside, which comes next.
            interface = part.interface if definition and not part.init.spec.inner else None
            meanings = {
                slot.name: slot.meaning.format(
                    source, nu=f"{nu}, {'corrected' if corrected else 'raw'}"
                )
                for slot in (definition.slots if definition else ())
                if hasattr(its, slot.name)
            }
            if interface and interface.tracks:
                unsigned = [name for name, slot in slots_of(part).items() if not slot.signed]
                nu, corrected = (meanings.get(unsigned[0], "") if unsigned else ""), False
            if definition and "nu" in definition.corrects:
                corrected = True
            if interface and interface.takes == "moments" and interface.gives == "updates":
                source = "directions"  # what is averaged behind is no gradient
            if interface and interface.rate == "applies":
                source = "steps"
            name = part.init.spec.constructor.__name__ if definition else show(part), group
            self.stages.append(
                StageInstance(place, part, its, group, (*name, names.count(name)), meanings)
            )
            names.append(name)
