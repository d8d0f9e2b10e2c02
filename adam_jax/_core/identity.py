"""Whether a state belongs to a transformation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_jax._core.errors import some
from adam_jax._core.spec import Spec, show, spec_of, wrapped


def mismatch(tx: Any, state: Any, place: str = "") -> str | None:
    """Says where a state is not one of `tx`.

    "at [0] a TrackMeanState, where it keeps a TrackMeanSquareState".

    Compared are the classes of states, the groups, and which counters and settable values there
    are; never numbers.
    """
    spec, at = spec_of(tx), f"at {place} " if place else ""
    if spec is None:
        return None
    if spec.stages:
        if (
            not isinstance(state, (tuple, list))
            or isinstance(state, optax.EmptyState)
            or hasattr(state, "_fields")
        ):
            return f"{at}{_a(state)}, where it keeps the states of {len(spec.stages)} stages"
        if len(state) != len(spec.stages):
            states = f"the states of {len(state)} stages ({_kinds(state)})"
            return f"{at}{states}, where it keeps {len(spec.stages)}"
        found = (
            mismatch(part, its, f"{place}[{i}]")
            for i, (part, its) in enumerate(zip(spec.stages, state, strict=True))
        )
        return next(filter(None, found), None)
    if spec.inner:
        return _wrapper_mismatch(tx, spec, state, place)
    expected = _blank(spec)
    if not hasattr(expected, "_fields"):
        # A stranger's state without a class, such as a tree like the parameters, has nothing to
        # compare
        return None
    if type(state) is not type(expected):
        return f"{at}{_a(state)}, where it keeps {_a(expected)}"
    of_parameters = _of_parameters(spec)
    for field in getattr(expected, "_fields", ()):
        has, keeps = getattr(state, field), getattr(expected, field)
        if field in of_parameters:
            continue
        if isinstance(keeps, dict) and isinstance(has, dict) and has.keys() != keeps.keys():
            return f"{at}the settable {_listed(has)}, where it keeps {_listed(keeps)}"
        if has is None and keeps is not None:
            return f"{at}no {field}, which it needs"
        if has is not None and keeps is None and field != spec.definition.counter:
            return f"{at}{field}, which it does not keep"
    return None


def _blank(spec: Spec) -> Any:
    try:
        return spec.blank
    except Exception:
        # A stranger's stage may want other parameters than a scalar: then nothing can be compared.
        return None


def _of_parameters(spec: Spec) -> set[str]:
    """The fields of a stage's state that hold something for each parameter."""
    return {"scales", *spec.definition.trees, *(slot.name for slot in spec.definition.slots)}


def _wrapper_mismatch(tx: Any, spec: Spec, state: Any, place: str) -> str | None:
    inner, at = spec.inner, f"at {place} " if place else ""
    if hasattr(state, "inner_states"):
        if not isinstance(state.inner_states, dict) or state.inner_states.keys() != inner.keys():
            return f"{at}the groups {_listed(state.inner_states)}, where it has {_listed(inner)}"
    elif not hasattr(state, "inner_state") or "" not in inner:
        return f"{at}{_a(state)}, where it keeps that of {spec.constructor.__name__}"
    found = (mismatch(part, its, f"{place}{inside}") for inside, _, part, its in wrapped(tx, state))
    return next(filter(None, found), None)


def states_of(tx: Any, state: Any) -> list[tuple[str, Any]]:
    """Returns the states of `tx` inside a state, with their places.

    The whole, or those inside of wrappers of other libraries.
    """

    def search(node: Any, place: str) -> Iterator[tuple[str, Any]]:
        if mismatch(tx, node) is None:
            yield place, node
            return
        for keys, child in jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node
        )[0]:
            if keys:
                yield from search(child, place + jax.tree_util.keystr(keys))

    return list(search(state, "")) if spec_of(tx) else [("", state)]


def expect_arrays(tx: Any, state: Any, caller: str) -> None:
    """Refuses a state of `tx` in which something else stands in the place of an array.

    Such as a list of its numbers.

    A Python number may stand for a count or for a settable value: `optax.tree.set` puts it there.

    Raises:
      TypeError: says where it is, and what to do.
    """
    for spec, own, place in _parts(tx, state):
        trees = _of_parameters(spec)
        expected = None if spec.inner else _blank(spec)
        for field in getattr(own, "_fields", ()):
            value = getattr(own, field)
            one = field not in (*trees, "inner_state", "inner_states") and _has_dtype(
                getattr(expected, field, None)
            )
            if _is_list_of_numbers(value) or (one and isinstance(value, (list, tuple, dict))):
                raise TypeError(_no_array(caller, f"{place}.{field}", value))
            if field in trees and not all(map(_has_dtype, jax.tree.leaves(value))):
                located = jax.tree_util.tree_leaves_with_path(value, is_leaf=_is_list_of_numbers)
                keys, wrong = next((keys, leaf) for keys, leaf in located if not _has_dtype(leaf))
                raise TypeError(
                    _no_array(caller, f"{place}.{field}{jax.tree_util.keystr(keys)}", wrong)
                )


def expect_one_member(tx: Any, state: Any, caller: str) -> None:
    """Refuses a state that was made under `jax.vmap` where it is not used under it.

    Its debias factors, one for each member, would be taken for those of leaves.

    Raises:
      ValueError: where a counter is no scalar integer.
    """
    for spec, own, place in _parts(tx, state):
        counter = spec.definition.counter
        count = getattr(own, counter, None) if counter else None
        if count is None or not _has_dtype(count):
            continue
        if count.shape or not jnp.issubdtype(count.dtype, jnp.integer):
            raise ValueError(
                f"{caller}: found {place}.{counter} of shape {count.shape} and dtype "
                f"{count.dtype}; expected an integer scalar. A state that was made under jax.vmap "
                "is updated under it."
            )


def _parts(tx: Any, state: Any, place: str = "") -> Iterator[tuple[Spec, Any, str]]:
    """The stages and wrappers of this package, their own states, and the places of these."""
    spec = spec_of(tx)
    if spec is None:
        return
    if spec.stages:
        for i, (part, its) in enumerate(zip(spec.stages, state, strict=True)):
            yield from _parts(part, its, f"{place}[{i}]")
        return
    yield spec, state, place
    for inside, _, part, its in wrapped(tx, state) if spec.inner else ():
        yield from _parts(part, its, place + inside)


def _has_dtype(leaf: Any) -> bool:
    return hasattr(leaf, "dtype")


def _is_list_of_numbers(node: Any) -> bool:
    leaves = jax.tree.leaves(node) if isinstance(node, list) else []
    return bool(leaves) and not any(map(_has_dtype, leaves))


def _no_array(caller: str, place: str, value: Any) -> str:
    return (
        f"{caller}: the state has a {type(value).__name__} at {place}; expected an array. Restore "
        "a checkpoint with the state of tx.init(params) as its target, or make an array of each "
        "list of numbers with jnp.asarray."
    )


def expect_state(tx: Any, state: Any, caller: str) -> None:
    """Refuses a state of another transformation, at trace time.

    Raises:
      ValueError: says both, where they differ, and which call converts.
      TypeError: where something else than an array is in the state.
    """
    wrong = mismatch(tx, state)
    if wrong is None:
        expect_arrays(tx, state, caller)
        return
    theirs = [node for node in jax.tree.leaves(state, is_leaf=_is_optax) if _is_optax(node)]
    if theirs:
        remedy = "A run of Optax goes on with from_optax(state, tx, params)."
    elif state is None:
        remedy = "Begin with tx.init(params)."
    elif isinstance(state, (dict, list)) and not _looks_saved(state):
        remedy = "It takes update(gradients, state, params), in this order."
    elif isinstance(state, (dict, list)):
        remedy = (
            "Restore a checkpoint with the state of tx.init(params) as its target, so that it "
            "comes back with its classes."
        )
    else:
        remedy = (
            "Carry the run over with convert_state(state, from_tx, to_tx, params), or begin with "
            "tx.init(params)."
        )
    raise ValueError(
        f"{caller}: {show(tx)} got the state of another transformation: {wrong}. {remedy}"
    )


def _looks_saved(state: Any) -> bool:
    """Whether a dict or a list is a state that was saved without its classes.

    Such a state has the names or the numbers of its stages on top, and the names of their fields
    below. Parameters and gradients do not have them.
    """
    located = jax.tree_util.tree_leaves_with_path(state)
    keys = {str(getattr(entry, "key", entry)) for path, _ in located for entry in path}
    return bool(keys & {"count", "mu", "nu", "step", "hyperparams", "inner_state"})


def _is_optax(node: Any) -> bool:
    return (
        hasattr(node, "_fields")
        and type(node).__module__.startswith("optax.")
        and bool(node._fields)
    )


def _a(state: Any) -> str:
    if isinstance(state, tuple) and not hasattr(state, "_fields"):
        return f"the states of {len(state)} stages ({_kinds(state)})"
    return f"a {type(state).__name__}"


def _kinds(states: Any) -> str:
    names = [type(state).__name__ for state in states]
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _listed(names: Any) -> str:
    shown = [repr(name) for name in names]
    return some(shown, 3) or "none"
