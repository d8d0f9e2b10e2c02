"""`reset`: moments and schedules that start afresh, in the state alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._bias import LookAheadState, RectifyState
from adam_jax._moments import TrackMeanState, TrackMomentsState, TrackSquareState
from adam_jax._paths import path_of
from adam_jax._refine import KeepMaximumState, MixSlowMeanState
from adam_jax._tree import PyTree, narrower_than_float32, takes_part
from adam_jax.storage import Resting, narrow_to_nearest, put_back, take_out

TRACKED = (TrackMomentsState, TrackMeanState, TrackSquareState)
SIGNED = {"mu": True, "nu": False, "nu_max": False, "mu_slow": True}
"""The fields of moments, and whether these can be negative."""


def reset(
    state: PyTree, *, moments: bool = True, schedule: bool = False, match: str | Callable[[str], bool] | None = None
) -> PyTree:
    r"""Starts moments or schedules afresh, for all leaves or for those whose paths match.

        state = reset(state)                                            # all moments
        state = reset(state, match="head/")                             # those of one part of the model
        state = reset(state, moments=False, schedule=True)              # warm up once more, with the moments as they are

    A moment that starts afresh has no weight yet, so its steps are those of a new run, corrected for the bias of a new run, while
    the others go on as if nothing had happened. To that end the weights of a state some of whose leaves were reset have an entry
    a leaf: its shapes change, and a jitted step is compiled once more. Moments at rest as codes or narrow floats stay so.

    Args:
      state: that of any transformation of this package, inside any wrapper. Moments of others' transformations are left alone.
        A state that was made under `jax.vmap` is reset under it.
      moments: start mu, nu, nu_max and mu_slow. What is neither is kept: averaged parameters, bits that `compensate` keeps.
      schedule: start the counts that schedules read, those of `optax.scale_by_schedule` and `optax.inject_hyperparams` too.
        Moments and their correction do not depend on them.
      match: which: a regular expression, searched in the path of each array in the state as `jax.tree_util.keystr` writes it
        ("[0].mu['head']['kernel']", "[3].step") and, of moments, in that of their parameter as `by_path` has it ("head/kernel");
        or a function of the first. `None`: all.

    Returns:
      The state, of the same structure.

    Raises:
      ValueError: if there is nothing to reset: neither is asked for, or no path matches; or if a leaf's ν matches without its μ.
      TypeError: if `match` is neither.
    """
    if not (moments or schedule):
        raise ValueError("reset: found moments=False and schedule=False; expected at least one of them.")
    picked_moments, picked_counts = _Picks(match), _Picks(match)
    marks: dict[str, np.ndarray] = {}
    split = False

    def visit(node: Any, place: str) -> Any:
        nonlocal marks, split
        if moments and isinstance(node, (*TRACKED, KeepMaximumState, MixSlowMeanState)):
            node, its = _restart(node, place, picked_moments)
            if isinstance(node, TRACKED):
                # What flows on to the stages behind: their memories of a weight start with the moments.
                marks = {"mu": its["mu" if "mu" in its else "nu"], "nu": its["nu" if "nu" in its else "mu"]}
                both = np.stack([marks["mu"], marks["nu"]])
                # Each leaf needs a weight of its own where some start afresh, or did before.
                split = not both.all() and (node.weights.ndim == 3 or bool((both.any(1) != both.all(1)).any()))
                node = node._replace(weights=_zeroed(node.weights, 2, both, split))
        elif moments and isinstance(node, LookAheadState) and marks:
            node = node._replace(weight=_zeroed(node.weight, 1, marks["mu"], split))
        elif moments and isinstance(node, RectifyState) and marks:
            node = node._replace(age=_zeroed(node.age, 0, marks["nu"], split))
        else:
            children: list[Any]
            structure: Any
            children, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
            if children and children[0][0]:
                parts = [visit(child, place + jax.tree_util.keystr(key)) for key, child in children]
                node = structure.unflatten(parts)
        for field in _counts(node) if schedule else ():
            if picked_counts(f"{place}.{field}"):
                node = node._replace(**{field: jnp.zeros_like(getattr(node, field))})
        return node

    new = visit(state, "")
    for asked, picks, what in [(moments, picked_moments, "moments"), (schedule, picked_counts, "counts of a schedule")]:
        if asked and not picks.hit:
            shown = ", ".join(map(repr, picks.met[:4])) + (" …" if len(picks.met) > 4 else "")
            raise ValueError(
                f"reset: found no {what} whose path matches {match!r}; expected one of {shown}."
                if shown
                else f"reset: found no {what} in the state; expected that of a transformation of adam_jax."
            )
    return new


class _Picks:
    """Whether a path is chosen; remembers which it was asked for, for the error where none is."""

    def __init__(self, match: str | Callable[[str], bool] | None) -> None:
        try:
            self.match = re.compile(match).search if isinstance(match, str) else match or (lambda path: True)
        except re.error as error:
            raise ValueError(f"reset: match: found {match!r}, which is no regular expression: {error}.") from error
        if not callable(self.match):
            raise TypeError(f"reset: match: found {match!r}; expected a regular expression, or a function of a path.")
        self.is_pattern = isinstance(match, str)
        self.met: list[str] = []
        self.hit = False

    def __call__(self, path: str, name: str | None = None) -> bool:
        self.met.append(path)
        chosen = bool(self.match(path)) or (self.is_pattern and name is not None and bool(self.match(name)))
        self.hit |= chosen
        return chosen


def _restart(node: Any, place: str, picks: _Picks) -> tuple[Any, dict[str, np.ndarray]]:
    """A stage's state with the chosen leaves of its moments at their start, and which these are."""
    marks = {}
    weights, leaves = getattr(node, "weights", None), len(jax.tree.leaves(getattr(node, "mu", getattr(node, "nu", None))))
    if weights is not None and (jnp.ndim(node.count) or weights.shape not in ((2, 2), (2, 2, leaves))):
        raise ValueError(
            f"reset: at {place}.weights found the shape {weights.shape}; expected (2, 2), or (2, 2, {leaves} leaves). Call reset "
            f"under jax.vmap for a state that was made under it."
        )
    for field, signed in SIGNED.items():
        if field not in node._fields:
            continue
        tree = getattr(node, field)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        named = [(f"{place}.{field}{jax.tree_util.keystr(path)}", path_of(path)) for path in paths]
        marks[field] = np.array([picks(*name) for name in named], bool)
        start = node.hyperparams.get("nu_init", 0.0) if field == "nu" else 0.0
        resting = zip(take_out(field, tree, node.scales), marks[field], strict=True)
        started = [_start(leaf, start, signed) if mark else leaf for leaf, mark in resting]
        tree, scales = put_back(field, tree, node.scales, started)
        node = node._replace(**{field: tree, "scales": scales})
    if "mu" in marks and (without := marks.get("nu", marks["mu"]) & ~marks["mu"]).any():
        raise ValueError(
            f"reset: at {place or 'the top'} found that the ν of {int(without.sum())} leaves matches, and their μ does not; "
            f"expected both: μ over the root of a ν that has seen one gradient has no bound. Match the name of the leaf."
        )
    return node, marks


def _start(leaf: Resting, start: Any, signed: bool) -> Resting:
    like = leaf.array
    wide = jnp.float32 if not takes_part(like) or narrower_than_float32(like) else like.dtype
    return narrow_to_nearest(jnp.full_like(like, start, wide), leaf, signed)


def _zeroed(weight: Array, ndim: int, marks: np.ndarray, split: bool) -> Array:
    """A weight, of `ndim` dimensions before there is one a leaf, that is 0 where the moments start afresh."""
    if split:
        return jnp.where(marks, 0, weight if weight.ndim > ndim else weight[..., None])
    return jnp.zeros(weight.shape[:ndim], weight.dtype) if marks.all() else jnp.where(marks.all(-1), 0, weight)


def _counts(node: Any) -> Sequence[str]:
    """The fields of a state that schedules read: counts beside a record of hyperparameters, or alone."""
    fields = getattr(node, "_fields", ())
    reads = isinstance(getattr(node, "hyperparams", None), dict) or fields == ("count",)
    return [field for field in ("step", "count") if field in fields] if reads else []
