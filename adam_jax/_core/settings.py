"""Hyperparameters of a run: read by stable names, and set where they are settable.

The step that schedules have reached can be set as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adam_jax._core.configuration import (
    definition_of,
    iter_stages,
    read_counters,
    rebuilt,
    tracks,
    with_inside,
)
from adam_jax._core.errors import brief
from adam_jax._core.hyperparams import Hyperparameter, cast
from adam_jax._core.identity import expect_arrays, expect_state, states_of
from adam_jax._core.leaves import PyTree, scalar_dtype
from adam_jax._core.spec import show, spec_of
from adam_jax._core.transformation import expect_transformation


class _Found(NamedTuple):
    """A hyperparameter of a stage.

    Its name, itself, the stage's state, and the steps that its schedule has seen.
    """

    name: str
    hyperparameter: Hyperparameter
    state: Any
    steps: Array | None


def hyperparameters(state: PyTree, tx: Any) -> dict[str, Array]:
    """Returns the values that the last step used, of all hyperparameters.

        used = hyperparameters(state, tx)["learning_rate"]

    Args:
      state: a state of `tx`, or one of a wrapper of Optax that holds one.
      tx: the transformation; where Optax wraps it, the one inside.

    Returns:
      Scalars by name: "learning_rate", "b1", "b2", "eps" and so on, whatever wrappers of this
      package are around. A hyperparameter of a group of `by_path` has the name of the group in
      front: "head/.*/learning_rate". Where a name occurs again, in a chain of several optimizers,
      it is "learning_rate#1". Before the first step these are the values that the first step will
      use.

    Raises:
      TypeError: if `tx` is no transformation.
      ValueError: if the state is not one of `tx`, or holds several.
    """
    inside = _only_state(tx, state, "hyperparameters")
    made = {}
    for name, its, own, count in _found(tx, inside):
        before = None if count is None else jnp.maximum(count - 1, 0)
        made[name] = cast(its.at(before, getattr(own, "hyperparams", {})), scalar_dtype(own))
    return made


def set_hyperparameters(
    state: PyTree, tx: Any, values: dict[str, Any] | None = None, /, **by_name: Any
) -> PyTree:
    """Returns the state with other values of settable hyperparameters.

        tx = adamw(settable(1e-3))
        state = set_hyperparameters(state, tx, learning_rate=3e-4)

    A jitted step is not compiled again. Moments are not copied: where a step donates its state, use
    the new one alone. A group whose learning rate has a multiplier keeps it: the
    state holds the value before the multiplier.

    Args:
      state: a state of `tx`, or one of a wrapper of Optax that holds one.
      tx: the transformation; where Optax wraps it, the one inside.
      values: the values by the names of `hyperparameters`. A name without a group sets it in all
        groups.
      **by_name: the same, for names that Python can write.

    Raises:
      TypeError: if `tx` is no transformation, or a value is no number.
      ValueError: if `tx` has no hyperparameter of that name, if it is not settable, or if a number
        is outside its interval.
    """
    wanted = {**(values or {}), **by_name}
    inside = _only_state(tx, state, "set_hyperparameters")
    found = list(_found(tx, inside))
    changes: dict[int, dict[str, Any]] = {}
    for name, value in wanted.items():
        picked = [
            each for each in found if each.name == name or each.name.rpartition("/")[2] == name
        ]
        if not picked:
            known = ", ".join(each.name for each in found)
            raise ValueError(f"set_hyperparameters: found {name!r}; expected one of {known}.")
        for each in picked:
            if not each.hyperparameter.settable:
                raise ValueError(
                    f"set_hyperparameters: {each.name} is not settable in {show(tx)}. Make the "
                    "transformation with settable(...) in place of its number, and carry the "
                    "state over with convert_state."
                )
            short = each.hyperparameter.name
            if callable(value):
                raise TypeError(
                    f"set_hyperparameters: {name}: found {brief(value)}; expected a number. A "
                    "schedule is given when the transformation is made."
                )
            Hyperparameter(short, value, each.hyperparameter.within)
            changes.setdefault(id(each.state), {})[short] = value
    states = []
    group_values: dict[tuple[Any, str], Any] = {}
    for _, group, _, own in iter_stages(tx, inside):
        group_values |= {(group, short): value for short, value in changes.get(id(own), {}).items()}
    for _, group, part, own in iter_stages(tx, inside):
        kept, definition = getattr(own, "hyperparams", {}), definition_of(part)
        declared = definition.hyperparameters if definition else {}
        # A decay that follows the learning rate keeps a copy of it, which it does not declare.
        copies = {
            short: group_values[group, short]
            for short in kept
            if (group, short) in group_values and short not in declared
        }
        new = changes.get(id(own), {}) | copies
        # Copies, one a place: a step may donate the state, and the caller keeps what was given.
        fitted = {
            short: jnp.array(value, kept[short].dtype, copy=True) for short, value in new.items()
        }
        states.append(own._replace(hyperparams={**kept, **fitted}) if new else own)
    return with_inside(state, {id(inside): rebuilt(tx, iter(states))})


def set_settable(state: PyTree, tx: Any, values: Mapping[str, Any]) -> PyTree:
    """Returns a state of `tx` with those of the values set that are settable in it."""
    names = {each.hyperparameter.name for each in _found(tx, state) if each.hyperparameter.settable}
    wanted = {name: value for name, value in values.items() if name in names}
    return set_hyperparameters(state, tx, wanted) if wanted else state


def set_step(state: PyTree, tx: Any, step: Any) -> PyTree:
    """Returns the state with all schedules at another step.

    Moments, and the weights by which their bias is corrected, stay as they are, and are not copied.

    Args:
      state: a state of `tx`, or one of a wrapper of Optax that holds one.
      tx: the transformation; where Optax wraps it, the one inside.
      step: the number of steps that schedules shall take for done, 0 or more.

    Raises:
      TypeError: if `tx` is no transformation, or `step` no whole number.
      ValueError: if the state is not one of `tx`, no hyperparameter of `tx` is a schedule, or
        `step` is negative.
    """
    traced = isinstance(step, jax.core.Tracer)
    whole = isinstance(step, int) or (
        getattr(step, "shape", None) == () and jnp.issubdtype(step.dtype, jnp.integer)
    )
    if not traced and (isinstance(step, bool) or not whole):
        raise TypeError(f"set_step: step: found {brief(step)}; expected a whole number.")
    if not traced and not 0 <= int(step) < 2**31 - 1:
        raise ValueError(f"set_step: step: found {step!r}; expected a number from 0 to 2³¹ − 2.")
    inside = _only_state(tx, state, "set_step")
    reads = read_counters(tx, inside)
    if not reads:
        raise ValueError(
            f"set_step: found no schedule in {show(tx)}; expected one, for example of the learning "
            "rate."
        )
    states = (
        # A copy for each place: a step may donate the state.
        own._replace(**{reads[place]: jnp.array(step, jnp.int32, copy=True)})
        if place in reads
        else own
        for place, _, _, own in iter_stages(tx, inside)
    )
    return with_inside(state, {id(inside): rebuilt(tx, states)})


def _found(tx: Any, state: Any) -> Iterator[_Found]:
    """The hyperparameters of all stages.

    With the names under which `hyperparameters` shows them.
    """
    seen: Counter[str] = Counter()
    count: Array | None = None
    where: tuple[str, ...] = ()
    for _, group, part, own in iter_stages(tx, state):
        definition = definition_of(part)
        if definition is None:
            continue
        if group != where:
            where, count = group, None
        if tracks(part):
            count = own.count  # of the moments: later stages read it as well
        reads = count if definition.counter is None else getattr(own, definition.counter, None)
        for short, its in definition.hyperparameters.items():
            name = "/".join([*group, short])
            yield _Found(f"{name}#{seen[name]}" if seen[name] else name, its, own, reads)
            seen[name] += 1


def _only_state(tx: Any, state: PyTree, caller: str) -> Any:
    """The one state of `tx` in a state."""
    expect_transformation(tx, caller)
    if spec_of(tx) is None:
        raise TypeError(
            f"{caller}: found {show(tx)}; expected a transformation of adam_jax. Where Optax wraps "
            "one, pass the one inside."
        )
    found = states_of(tx, state)
    if not found:
        expect_state(tx, state, caller)
    if len(found) != 1:
        raise ValueError(
            f"{caller}: found {len(found)} states of {show(tx)}, at "
            f"{', '.join(place or 'the top' for place, _ in found[:3])}; expected one. Pass the "
            "part of the state that has one."
        )
    expect_arrays(tx, found[0][1], caller)
    return found[0][1]
