"""`reset`: moments and schedules that start afresh."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._core.configuration import (
    definition_of,
    gathering,
    iter_stages,
    read_counters,
    rebuilt,
    slots_of,
    tracks,
    with_inside,
)
from adam_jax._core.errors import brief, expect_flag
from adam_jax._core.identity import expect_arrays, expect_state, states_of
from adam_jax._core.leaves import PyTree
from adam_jax._core.paths import path_of
from adam_jax._core.transformation import expect_transformation
from adam_jax.migrate.owned import owned
from adam_jax.storage.stored_leaf import StoredLeaf, repack_moment, unpack_moment


def reset(
    state: PyTree,
    tx: Any,
    *,
    moments: bool = True,
    schedule: bool = False,
    match: str | Callable[[str], bool] | None = None,
) -> PyTree:
    r"""Starts moments or schedules afresh, for all leaves or for those whose paths match.

        state = reset(state, tx)                                        # all moments
        # Those of one part of the model
        state = reset(state, tx, match="head/")
        # Warm up once more, with the moments as they are
        state = reset(state, tx, moments=False, schedule=True)

    A moment that starts afresh has no weight yet, so its steps are those of a new run, corrected
    for the bias of a new run. The others go on as if nothing had happened. To that end the weights
    of a state some of whose leaves were reset have an entry per leaf: its shapes change, and a
    jitted step is compiled once more. Moments keep their storage.

    Args:
      state: a state of `tx`, or one of a wrapper of Optax that holds one or several. A state that
        was made under `jax.vmap` is reset under it.
      tx: the transformation; where Optax wraps it, the one inside.
      moments: start the moments. Averaged parameters and the bits that `compensate` keeps stay.
      schedule: start the counts that schedules read, those of `optax.scale_by_schedule` and
        `optax.inject_hyperparams` too. Moments and their correction do not depend on them.
      match: which: a regular expression, searched in the path of each array in the state as
        `jax.tree_util.keystr` writes it ("[0].mu['head']['kernel']", "[3].step") and, of moments,
        in that of their parameter as `by_path` has it ("head/kernel"); or a function of the first.
        `None`: all.

    Returns:
      The state, of the same structure. Its arrays are its own, and can be donated.

    Raises:
      ValueError: if the state is not one of `tx`; if there is nothing to reset, because neither is
        asked for or no path matches; or if a leaf's ν matches without its μ.
      TypeError: if `tx` is no transformation, or `match` is neither.
    """
    expect_flag("reset: moments", moments)
    expect_flag("reset: schedule", schedule)
    if not (moments or schedule):
        raise ValueError(
            "reset: found moments=False and schedule=False; expected at least one of them."
        )
    expect_transformation(tx, "reset")
    picked_moments, picked_counts = _Picks(match), _Picks(match)
    inside = states_of(tx, state)
    if not inside:
        expect_state(tx, state, "reset")
    for _, own in inside:
        expect_arrays(tx, own, "reset")
    picks = picked_moments if moments else None, picked_counts if schedule else None
    given = state
    state = with_inside(
        state, {id(own): _reset_state(own, tx, place, *picks) for place, own in inside}
    )
    if schedule:
        state = _reset_foreign_counts(state, picked_counts)
    for asked, picked, what in [
        (moments, picked_moments, "moments"),
        (schedule, picked_counts, "counts of a schedule"),
    ]:
        if asked and not picked.hit:
            shown = ", ".join(map(repr, picked.met[:4])) + (" …" if len(picked.met) > 4 else "")
            raise ValueError(
                f"reset: found no {what} whose path matches {match!r}; expected one of {shown}."
                if shown
                else f"reset: found no {what} in the state; expected that of a transformation "
                "which has some."
            )
    return owned(state, given)


def _reset_state(
    state: Any, tx: Any, at: str, moments: _Picks | None, counts: _Picks | None
) -> Any:
    """A state of `tx` with the chosen moments and counts at their start."""
    marks: dict[str, np.ndarray] = {}
    split = False
    states, where, reads = [], None, read_counters(tx, state)
    for place, group, part, before in iter_stages(tx, state, at):
        node = before
        if group != where:
            where, marks, split = group, {}, False
        definition, columns = definition_of(part), gathering(part)
        if moments and definition and definition.slots:
            node, its = _restart(node, part, place, moments)
            if tracks(part):
                # What flows on to the stages behind: their memories of a weight start with the
                # moments.
                first = next(iter(its))
                marks = {name: its.get(name, its[first]) for name in ("mu", "nu")}
                # Each leaf needs a weight of its own where some start afresh, or did before.
                both = np.stack([marks["mu"], marks["nu"]])
                per_leaf = node.weights is not None and node.weights.ndim == 3
                split = not both.all() and (per_leaf or bool((both.any(1) != both.all(1)).any()))
                if node.weights is not None:
                    node = node._replace(
                        weights=_zeroed(
                            node.weights, 2, np.stack([marks[name] for name in columns]), split
                        )
                    )
        elif moments and definition and marks:
            for field, follower in definition.follows.items():
                value = getattr(node, field)
                if value is not None:
                    value = _zeroed(value, follower.ndim, marks[follower.moment], split)
                    node = node._replace(**{field: value})
        count = reads.get(place.removeprefix(at))
        if counts and count and counts(f"{place}.{count}"):
            node = node._replace(**{count: jnp.zeros_like(getattr(node, count))})
        states.append(node)
    return rebuilt(tx, iter(states))


def _reset_foreign_counts(state: Any, picks: _Picks) -> Any:
    """The state with the counts at 0 that schedules of Optax read."""

    def is_schedule(node: Any) -> bool:
        fields = getattr(node, "_fields", ())
        optaxs = type(node).__module__.startswith("optax.")
        return optaxs and (
            fields == ("count",)
            or ("count" in fields and isinstance(getattr(node, "hyperparams", None), dict))
        )

    def visit(path: Any, node: Any) -> Any:
        if not is_schedule(node):
            return node
        inside = {}
        for field in node._fields:
            at = (*path, jax.tree_util.GetAttrKey(field))
            inside[field] = jax.tree_util.tree_map_with_path(
                lambda keys, x, at=at: visit((*at, *keys), x),
                getattr(node, field),
                is_leaf=is_schedule,
            )
        if picks(f"{jax.tree_util.keystr(path)}.count"):
            inside["count"] = jnp.zeros_like(node.count)
        return type(node)(**inside)

    return jax.tree_util.tree_map_with_path(visit, state, is_leaf=is_schedule)


class _Picks:
    """Whether a path is chosen; remembers which it was asked for, for the error where none is."""

    def __init__(self, match: str | Callable[[str], bool] | None) -> None:
        try:
            self.match = (
                re.compile(match).search if isinstance(match, str) else match or (lambda path: True)
            )
        except re.error as error:
            raise ValueError(
                f"reset: match: found {match!r}, which is no regular expression: {error}."
            ) from error
        if not callable(self.match):
            raise TypeError(
                f"reset: match: found {brief(match)}; expected a regular expression, or a function "
                "of a path."
            )
        self.is_pattern = isinstance(match, str)
        self.met: list[str] = []
        self.hit = False

    def __call__(self, path: str, name: str | None = None) -> bool:
        self.met.append(path)
        chosen = bool(self.match(path)) or (
            self.is_pattern and name is not None and bool(self.match(name))
        )
        self.hit |= chosen
        return chosen


def _restart(node: Any, tx: Any, place: str, picks: _Picks) -> tuple[Any, dict[str, np.ndarray]]:
    """A stage's state with the chosen leaves of its moments at their start, and which these are."""
    marks = {}
    slots, columns = slots_of(tx), len(gathering(tx))
    leaves = len(jax.tree.leaves(getattr(node, next(iter(slots)))))
    weights = getattr(node, "weights", None)
    mapped = hasattr(node, "weights") and jnp.ndim(node.count)
    if mapped or (
        weights is not None and weights.shape not in ((2, columns), (2, columns, leaves))
    ):
        shape = None if weights is None else weights.shape
        raise ValueError(
            f"reset: at {place}.weights found the shape {shape}; expected (2, {columns}), or (2, "
            f"{columns}, {leaves} leaves). Call reset under jax.vmap for a state that was made "
            "under it."
        )
    for name, slot in slots.items():
        tree = getattr(node, name)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        named = [(f"{place}.{name}{jax.tree_util.keystr(path)}", path_of(path)) for path in paths]
        marks[name] = np.array([picks(*each) for each in named], bool)
        stored = zip(unpack_moment(slot, tree, node.scales), marks[name], strict=True)
        started = [_start(leaf) if mark else leaf for leaf, mark in stored]
        tree, scales = repack_moment(slot, tree, node.scales, started)
        node = node._replace(**{name: tree, "scales": scales})
    if "mu" in marks and (without := marks.get("nu", marks["mu"]) & ~marks["mu"]).any():
        raise ValueError(
            f"reset: at {place or 'the top'} found that the ν of {int(without.sum())} leaves "
            "matches, and their μ does not; expected both: μ over the root of a ν that has seen "
            "one gradient has no bound. Match the name of the leaf."
        )
    return node, marks


def _start(leaf: StoredLeaf) -> StoredLeaf:
    dtype = jnp.float32 if leaf.narrowed else leaf.array.dtype
    return leaf.storing(jnp.full_like(leaf.array, leaf.slot.start, dtype))


def _zeroed(weight: Array, ndim: int, marks: np.ndarray, split: bool) -> Array:
    """Returns a debias factor that is 0 where the moments start afresh.

    It has `ndim` dimensions before there is one per leaf.
    """
    if split:
        return jnp.where(marks, 0, weight if weight.ndim > ndim else weight[..., None])
    return (
        jnp.zeros(weight.shape[:ndim], weight.dtype)
        if marks.all()
        else jnp.where(marks.all(-1), 0, weight)
    )
