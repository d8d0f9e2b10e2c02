"""`from_optax` and `to_optax`: a run of an Optax optimizer goes on in ours, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from adam_jax._core.errors import some
from adam_jax._core.leaves import PyTree, arrays_of, takes_part
from adam_jax._core.paths import RAW, path_of
from adam_jax._core.settings import hyperparameters, set_settable
from adam_jax._core.transformation import abstract_state
from adam_jax.migrate.counted import agreed, whole
from adam_jax.migrate.foreign_state import (
    ForeignState,
    all_leaves,
    decays,
    fill,
    memories,
    read,
    same_kinds,
    same_leaves,
    trained,
)
from adam_jax.migrate.injected import expect_recorded, merged, records, value_to_record
from adam_jax.migrate.kinds import kind_of
from adam_jax.migrate.owned import owned

MOMENTS: dict[str, dict[str, str]] = {
    "ScaleByAdamState": {"mu": "mu", "nu": "nu"},
    "ScaleByBeliefState": {"mu": "mu", "nu": "belief"},
    "ScaleByAmsgradState": {"mu": "mu", "nu": "nu", "nu_max": "nu_max"},
    "ScaleByAdemamixState": {"m1": "mu", "m2": "mu_slow", "nu": "nu"},
    "ScaleByRmsState": {"nu": "nu"},
    "ScaleByRmsWithCountState": {"nu": "nu"},
    "ScaleByRStdDevState": {"mu": "mu", "nu": "nu"},
    "ScaleByRStdDevWithCountState": {"mu": "mu", "nu": "nu"},
    "TraceState": {"trace": "trace"},
    "EmaState": {"ema": "mu"},
}
"""The kinds of moments by the field of an Optax state.

By its name, because not every version has all, nor in public.
"""


ALSO = {"nu": "infinity", "trace": "trace of steps"}
"""What a kind can be as well: Optax has the same type for both, and its member says which."""


class Node(NamedTuple):
    """A state of Optax in its place."""

    place: str
    state: Any


class Moment(NamedTuple):
    """A moment of Optax: the state that has it, and its field there."""

    node: Node
    field: str

    @property
    def place(self) -> str:
        """Where it is in the state."""
        return f"{self.node.place}.{self.field}"

    @property
    def leaves(self) -> dict[str, Any]:
        """Those that have moments, by path."""
        return trained(getattr(self.node.state, self.field))


def from_optax(state: PyTree, tx: Any, params: PyTree, *, count: int | None = None) -> PyTree:
    """The state of `tx` in a run that Optax began.

        tx = adam_jax.adamw(1e-3)                         # in the place of optax.adamw(1e-3)
        state = adam_jax.migrate.from_optax(state, tx, params)

    An Optax state alone does not say enough: Adam, Nadam, RAdam, Yogi, AdaMax and ADOPT share one
    type, and the decays, of which our weights follow, are in none. So `tx` has to be the member
    that the run had, with its decays. Its storage is free: moments are rounded to nearest. What
    Optax does not have, averages and what guards have counted, starts afresh.

    Args:
      state: that of an Optax optimizer, whole or the part that has the moments. Inside
        `optax.inject_hyperparams`, `optax.apply_if_finite`, `optax.masked` and the groups of
        `optax.partition` moments are found; `tx` may have groups too, the same or others
        (`by_path`).
      tx: the transformation of this package that goes on, or an `optax.MultiSteps` around it. Then
        the state is that of `MultiSteps` too, and gradients that were accumulated move with it.
      params: the present parameters.
      count: the steps taken, for a state that keeps no count: of RMSprop or momentum with a
        constant learning rate.

    Returns:
      A state of `tx`. Its arrays are its own, and can be donated.

    Raises:
      TypeError: if `tx` is no transformation.
      ValueError: where moments are missing or left over, there are two of a kind, counts differ or
        there is none; where `optax.inject_hyperparams` recorded another value than `tx` has. A
        learning rate may differ, and a settable hyperparameter becomes what was recorded.
    """
    caller = "from_optax"
    if isinstance(tx, optax.MultiSteps):
        return _in_multi_steps(state, tx, params, count)
    params = arrays_of(params)
    nodes, schedules, others = _split(state)
    first = abstract_state(tx, params, caller)
    _, ours = memories(tx, first, caller)
    found = _found(nodes, ours, caller)
    if not nodes:
        raise ValueError(
            f"{caller}: found no moments of Optax in a {type(state).__name__}; expected the state "
            "of an optimizer, such as optax.adam(1e-3).init(params) makes. Restore a checkpoint "
            "with such a state as its target, so that it comes back with its classes."
        )
    same_kinds(ours, _places(found), caller, "the state")
    recorded = list(records(state, _paths_in))
    if others and any(_is_multi_steps(x) for x in jax.tree.leaves(state, is_leaf=_is_multi_steps)):
        raise ValueError(
            f"{caller}: found the state of optax.MultiSteps, and a tx without it. Give "
            "tx=optax.MultiSteps(tx, every_k_schedule), which moves the accumulated gradients too; "
            "or state.inner_opt_state, where MultiSteps comes to an end."
        )
    if others:
        raise ValueError(
            f"{caller}: left over {some(others)}, which no member of adam_jax has. Give the part "
            "of the state that has the moments; of a wrapper with arrays of its own the state "
            "inside."
        )
    steps = agreed(schedules, caller)
    moments = agreed(
        {
            f"{node.place}.count": node.state.count
            for node in nodes
            if "count" in node.state._fields
        },
        caller,
    )
    known = next((n for n in (moments, steps, count) if n is not None), None)
    if known is None:
        raise ValueError(
            f"{caller}: the state keeps no count. Give the number of steps taken: from_optax(…, "
            "count=1000)."
        )
    known = whole(known, caller)
    if count not in (None, known):
        raise ValueError(
            f"{caller}: found count={count}, and {known} in the state; expected none where the "
            "state has one."
        )
    expect_recorded(recorded, tx, params, decays(tx, first, caller), known, caller)
    trees = {kind: all_leaves(its) for kind, its in found.items()}
    made = fill(tx, params, ForeignState(known, known if steps is None else steps, trees), caller)
    return set_settable(made, tx, merged(recorded))


def to_optax(state: PyTree, tx: Any, like: PyTree) -> PyTree:
    """A state of Optax in a run of ours.

        state = adam_jax.migrate.to_optax(state, tx, optax.adamw(1e-3).init(params))

    Args:
      state: that of `tx`.
      tx: the transformation of this package that the run had.
      like: a state of the Optax optimizer that goes on, to be filled: its moments, its counts and
        what `optax.inject_hyperparams` recorded become those of the run, in its dtypes; what it
        has besides stays.

    Returns:
      A state of the structure and dtypes of `like`. Its arrays are its own, and can be donated.

    Raises:
      TypeError: if `tx` is no transformation.
      ValueError: where moments are missing or left over, or the state has weights that no count
        says, as after `reset`.
    """
    caller = "to_optax"
    run = read(tx, state, caller)
    found = _found(_split(like)[0], run.moments, caller)
    same_kinds(run.moments, _places(found), caller, "like")
    for kind, its in found.items():
        same_leaves(run.moments[kind], all_leaves(its), f"{caller}: like")
    used = hyperparameters(state, tx)
    kinds = {moment.place: kind for kind, its in found.items() for moment in its}

    def fit(path: Any, node: Any) -> Any:
        place, name = jax.tree_util.keystr(path), type(node).__name__
        if (value := value_to_record(path, used)) is not None:
            return jnp.asarray(value, node.dtype)
        if not _has_moments(node):
            return jnp.asarray(run.step, node.dtype) if _is_count(path) else node
        trees = {
            field: _fitted(run.moments[kinds[f"{place}.{field}"]], getattr(node, field))
            for field in MOMENTS[name]
        }
        counts = {
            field: jnp.asarray(run.count, jnp.int32)
            for field in ("count", "count_m2")
            if field in node._fields
        }
        return node._replace(**trees, **counts)

    made = jax.tree_util.tree_map_with_path(fit, like, is_leaf=_has_moments)
    return owned(made, state, like)


def _in_multi_steps(state: Any, tx: optax.MultiSteps, params: PyTree, count: int | None) -> Any:
    """The state of an `optax.MultiSteps` around a transformation of ours, in the midst too."""
    if not _is_multi_steps(state):
        raise ValueError(
            f"from_optax: found optax.MultiSteps, and a state of {type(state).__name__}; expected "
            "one of MultiSteps. To begin to accumulate give the transformation inside, and then "
            "optax.MultiSteps(tx, k).init(params)._replace(inner_opt_state=state)."
        )
    inner = from_optax(state.inner_opt_state, tx.inner_opt, params, count=count)
    return owned(state._replace(inner_opt_state=inner), state, params)


def _is_multi_steps(node: Any) -> bool:
    return isinstance(node, optax.MultiStepsState)


def _has_moments(node: Any) -> bool:
    fields = MOMENTS.get(type(node).__name__)
    return fields is not None and type(node).__module__.startswith("optax.")


def _is_count(path: tuple[Any, ...]) -> bool:
    """Whether a leaf outside of the states with moments is what a schedule reads."""
    return GetAttrKey("count") in path[-1:] or (
        GetAttrKey("count") in path[-2:-1] and path[-1] in RAW
    )


def _split(state: PyTree) -> tuple[list[Node], dict[str, Any], list[str]]:
    """Returns the states with moments and the counts that schedules read.

    It also returns the places of arrays that are neither.
    """
    nodes, counts, others = [], {}, []
    for path, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=_has_moments):
        place = jax.tree_util.keystr(path)
        if _has_moments(node):
            nodes.append(Node(place, node))
        elif _is_count(path):
            counts[place] = node
        elif jnp.ndim(node) and takes_part(node):
            others.append(place)
    return nodes, counts, others


def _found(nodes: list[Node], ours: Mapping[str, Any], caller: str) -> dict[str, list[Moment]]:
    """The moments of Optax by kind: one for each group of `optax.partition`."""
    found: dict[str, list[Moment]] = {}
    for node in nodes:
        for field, its in MOMENTS[type(node.state).__name__].items():
            kind, moment = ALSO[its] if ALSO.get(its) in ours else its, Moment(node, field)
            for first in found.get(kind, ()):
                if both := first.leaves.keys() & moment.leaves.keys():
                    raise ValueError(
                        f"{caller}: found {kind_of(kind)} of {min(both)} at {first.place} and at "
                        f"{moment.place}; expected one for each parameter. Give the part of the "
                        "state that has one of them."
                    )
            found.setdefault(kind, []).append(moment)
    return found


def _places(found: Mapping[str, list[Moment]]) -> dict[str, str]:
    return {kind: ", ".join(moment.place for moment in its) for kind, its in found.items()}


def _paths_in(state: Any) -> Iterator[str]:
    """The leaves whose moments are in a part of a state."""
    for node in _split(state)[0]:
        for field in MOMENTS[type(node.state).__name__]:
            yield from Moment(node, field).leaves


def _fitted(moment: Mapping[str, Any], like: PyTree) -> PyTree:
    """A moment in the structure and the dtypes of `like`."""

    def leaf(path: Any, x: Any) -> Any:
        return moment[path_of(path)].astype(x.dtype) if takes_part(x) else x

    return jax.tree_util.tree_map_with_path(leaf, like)
