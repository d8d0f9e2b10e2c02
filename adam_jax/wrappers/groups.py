"""Groups of parameters by their paths.

Each with hyperparameters, storage or an optimizer of its own, or frozen.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from adam_jax._core.context import Context
from adam_jax._core.errors import expect_one_of, some
from adam_jax._core.interface import Interface
from adam_jax._core.leaves import PyTree, dtype_of, leaving_dtype, takes_part
from adam_jax._core.lift import lift
from adam_jax._core.paths import is_box, paths
from adam_jax._core.spec import Spec, bind, show
from adam_jax._core.transformation import (
    Transformation,
    call_update,
    expect_optimizer,
    hides_rate,
    transformation,
)
from adam_jax.wrappers.overrides import with_overrides
from adam_jax.wrappers.patterns import DEFAULT, expect_patterns, hint_to_pattern

Group: TypeAlias = optax.GradientTransformation | Mapping[str, Any] | Literal["frozen"]


class ByPathState(NamedTuple):
    """State of `by_path`.

    Attributes:
      inner_states: the state of each group by its pattern, "default" for that of the rest; frozen
        groups have none.
    """

    inner_states: dict[str, PyTree]


def by_path(
    groups: Mapping[str, Group],
    default: optax.GradientTransformation | Literal["frozen"],
    *,
    ordered: bool = False,
) -> Transformation:
    """Gives parameters their own optimizer or hyperparameters, or none, by their paths.

        tx = by_path(
            {
                r".*/(bias|scale)": {"weight_decay": 0.0},
                r"embed/.*": {"learning_rate_multiplier": 0.1, "storage": "8bit"},
                r"encoder/layer_[01]/.*": "frozen",
                r"head/.*": adam(1e-2),
            },
            default=adamw(1e-3, weight_decay=0.1),
        )

    A path is the names and indices to a leaf joined by "/", the same for dicts, Flax's linen and
    NNX, and Equinox: "encoder/layer_0/bias". A pattern is a regular expression that has to match
    all of it.

    Args:
      groups: by pattern, a transformation; arguments of `default` to change, a mapping by name,
        where "learning_rate_multiplier" multiplies its learning rate; or "frozen": no update and no
        state.
      default: the transformation of all other leaves, or "frozen".
      ordered: let a leaf that several patterns match belong to the first of them. Otherwise that is
        an error.

    Raises:
      TypeError: at once, for what is no transformation, no mapping and not "frozen", and for an
        argument that `default` has not.
      ValueError: at once, for no groups, a pattern that is no regular expression, a group that
        takes or gives `Moments`, and groups of which only some apply a learning rate. In `init` and
        `update`, for a pattern that matches no leaf, and a leaf that several match.
    """
    expect_patterns(groups)
    groups = {
        pattern: dict(group) if isinstance(group, Mapping) else group
        for pattern, group in groups.items()
    }
    expect_one_of("by_path: ordered", ordered, (True, False))
    flows, parts = {}, {}
    if isinstance(default, str):
        expect_one_of("by_path: default", default, ("frozen",))
    else:
        flows[DEFAULT] = expect_optimizer(default, "by_path: default")
    for pattern, group in groups.items():
        caller = f"by_path: {pattern!r}"
        if isinstance(group, str):
            expect_one_of(caller, group, ("frozen",))
            continue
        parts[pattern] = (
            with_overrides(default, group, caller) if isinstance(group, Mapping) else group
        )
        flows[pattern] = expect_optimizer(parts[pattern], caller)
    if not isinstance(default, str):
        parts[DEFAULT] = default
    if not parts:
        raise ValueError(
            "by_path: found that all groups and the default are 'frozen'; expected a "
            "transformation for some."
        )
    interface = _interface(parts, flows)
    for name, part in parts.items():
        parts[name] = (
            part if isinstance(part, Transformation) else optax.with_extra_args_support(part)
        )

    def init(params: PyTree) -> ByPathState:
        its = _labels(groups, params, ordered)
        return ByPathState(
            {name: part.init(only(name, its, params)) for name, part in parts.items()}
        )

    def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[Any, ByPathState]:
        if not isinstance(state, ByPathState) or state.inner_states.keys() != parts.keys():
            groups_of = (
                _listed(state.inner_states)
                if isinstance(state, ByPathState)
                else type(state).__name__
            )
            raise ValueError(
                f"by_path: found a state of {groups_of}; expected one of {_listed(parts)}, "
                "which `init` of these very groups made, or `update` returned."
            )
        lift(
            lambda update, param: update, updates, params=params
        )  # refuses trees that do not fit each other
        its = _labels(groups, updates, ordered)
        structure = jax.tree.structure(updates)
        made: dict[str, Iterator[Any]] = {}
        after = {}
        for name, part in parts.items():
            ours = functools.partial(only, name, its)
            trees = (updates, params, context.gradient, context.incoming)
            grads, held, gradient, incoming = (
                None if tree is None else ours(tree) for tree in trees
            )
            probe = None if context.probe is None else context.probe.group(name)
            extra = {
                key: ours(value) if _is_like(structure, value) else value
                for key, value in context.extra.items()
            }
            inner = context._replace(gradient=gradient, incoming=incoming, extra=extra, probe=probe)
            stepped, after[name] = call_update(part, grads, state.inner_states[name], held, inner)
            if probe is not None:
                # The gradient as it came in: behind a clipping the one that grows is not seen.
                raw = grads if gradient is None else gradient
                probe.end(part, raw, stepped, state.inner_states[name], held)
            made[name] = iter(jax.tree.leaves(stepped))
        leaves = jax.tree.leaves(updates)
        old = leaves if params is None else jax.tree.leaves(params)
        moved = [
            next(made[name]) if name in made else _still(u, p, params is not None)
            for name, u, p in zip(its, leaves, old, strict=True)
        ]
        return jax.tree.unflatten(structure, moved), ByPathState(after)

    bound = bind(by_path, (groups, default), {"ordered": ordered})
    split = functools.partial(_labels, groups, ordered=ordered)

    def freezes(path: str) -> bool:
        matching = (group for pattern, group in groups.items() if re.fullmatch(pattern, path))
        return isinstance(next(matching, default), str)

    return transformation(
        Spec(by_path, bound, init, update, interface, inner=parts, split=split, freezes=freezes)
    )


def _labels(groups: Mapping[str, Any], tree: PyTree, ordered: bool) -> list[str]:
    """The group of each leaf, in order."""
    found = paths(tree)
    matches = [[pattern for pattern in groups if re.fullmatch(pattern, path)] for path in found]
    if not ordered:
        for path, its in zip(found, matches, strict=True):
            if len(its) > 1:
                raise ValueError(
                    f"by_path: found {len(its)} patterns that match {path!r}: "
                    f"{', '.join(map(repr, its))}; expected one at most. Make them disjoint, or "
                    "say ordered=True for the first of them."
                )
    matched = {pattern for its in matches for pattern in its}
    for pattern in groups:
        if pattern not in matched:
            hint = hint_to_pattern(pattern, found)
            raise ValueError(
                f"by_path: found no leaf that {show(pattern)} matches; expected at least one, and "
                f"a match of the whole path. {hint}Paths are {_listed(found)}."
            )
    return [its[0] if its else DEFAULT for its in matches]


def _listed(names: Iterable[str]) -> str:
    return some(list(map(repr, names)), 8)


def only(name: str, its: list[str], tree: PyTree) -> PyTree:
    """Returns the tree with the leaves of one group alone.

    The boxes of other leaves are left out, since not all of Flax's can hold nothing. A leaf of
    others that is not trained is `None`, as its gradient may be: a masked node would be another
    tree.
    """
    groups = iter(its)

    def kept(node: Any) -> Any:
        structure: Any
        leaves, structure = jax.tree.flatten(node)
        mine = [x if next(groups) == name else optax.MaskedNode() for x in leaves]
        if not is_box(node) and hasattr(node, "dtype") and not takes_part(node):
            return mine[0] if jax.tree.leaves(mine) else None
        return (
            structure.unflatten(mine) if jax.tree.leaves(mine) or not leaves else optax.MaskedNode()
        )

    return jax.tree.map(kept, tree, is_leaf=is_box)


def _is_like(structure: Any, value: Any) -> bool:
    """Whether an extra argument is a tree like the parameters.

    Where these are one array, no number is taken for one.
    """
    return not jax.tree_util.treedef_is_leaf(structure) and bool(
        jax.tree.structure(value) == structure
    )


def _still(update: Any, param: Any, known: bool) -> Any:
    """The update of a frozen leaf: −0, which changes no bit of a parameter."""
    if takes_part(update):
        return -jnp.zeros_like(update, leaving_dtype(update, param if known else None))
    return jnp.zeros(jnp.shape(param), dtype_of(param)) if known else update


def _interface(parts: Mapping[str, Any], flows: Mapping[str, Interface]) -> Interface:
    """The flow of all groups together."""
    applying = [name for name, interface in flows.items() if interface.rate == "applies"]
    others = [name for name, part in parts.items() if name not in applying and not hides_rate(part)]
    if applying and others:
        raise ValueError(
            f"by_path: {applying[0]!r} applies a learning rate, and {others[0]!r}, "
            f"{show(parts[others[0]])}, does not; expected all or none: without one a step goes "
            "uphill. End it with scale_by_learning_rate(...), or say 'frozen'."
        )
    rate = (
        "applies"
        if applying
        else next((interface.rate for interface in flows.values() if interface.rate), None)
    )
    end: Any = "rounds" if any(interface.end == "rounds" for interface in flows.values()) else None
    moves, skips = (
        any(getattr(interface, name) for interface in flows.values()) for name in ("moves", "skips")
    )
    return Interface("updates", "updates", rate, None, end, moves, skips)
