"""`lift` applies a function of leaves to trees, and refuses trees that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, dtypes

from adam_jax._core.errors import some
from adam_jax._core.leaves import PyTree, dtype_of, is_half, leaving_dtype, takes_part


def lift(
    f: Callable[..., Any],
    updates: PyTree,
    /,
    *,
    outputs: int = 1,
    free: tuple[str, ...] = (),
    **others: PyTree,
) -> Any:
    """Applies a leaf's mathematics to trees, and is where trees that do not fit are refused.

    Args:
      f: takes a leaf of `updates` and, by position, the leaves of the other trees at its place.
      updates: the tree whose structure and shapes the others must have.
      outputs: how many trees `f` makes. The first stands where `updates` stood: leaves that take no
        part are handed on in it, and are `None` in the rest.
      free: names among `others` whose leaves may be 1 along any axis (a ν that a block shares).
      **others: trees under the names that an error message gives them; `None` stands for a tree
        that is not there.

    Raises:
      ValueError: where the trees differ, with the path of the leaf, both shapes, and what to do.
    """
    located, structure = _located(updates)
    columns = []
    for name, other in others.items():
        if other is None:
            columns.append([None] * len(located))
            continue
        try:
            column = structure.flatten_up_to(other)
        except (ValueError, TypeError):
            column = None
        if column is None or not _fits(located, column, name in free):
            raise ValueError(_misfit(located, updates, name, other, name in free))
        columns.append(column)
    rows = []
    for (_, leaf), *rest in zip(located, *columns, strict=True):
        if takes_part(leaf):
            made = f(leaf, *rest)
            rows.append((made,) if outputs == 1 else made)
        else:
            rows.append((leaf,) + (None,) * (outputs - 1))
    trees = tuple(structure.unflatten([row[i] for row in rows]) for i in range(outputs))
    return trees[0] if outputs == 1 else trees


def expect_gradients(updates: PyTree, params: PyTree, caller: str) -> None:
    """Refuses gradients that are none of their parameters.

    Raises:
      ValueError: for a floating gradient of an integer parameter, and for a complex one of a real
        parameter, whose imaginary part would be lost.
    """
    located, structure = _located(updates)
    if params is None or structure != jax.tree_util.tree_structure(params):
        return  # `lift` says in what trees differ
    for (keys, update), param in zip(located, jax.tree.leaves(params), strict=True):
        if not (hasattr(update, "dtype") and hasattr(param, "dtype") and takes_part(update)):
            continue
        at, found = _at(jax.tree_util.keystr(keys)), f"found a gradient of {dtype_of(update)}"
        if not takes_part(param):
            raise ValueError(
                f"{caller}: {at}{found} for a parameter of {dtype_of(param)}, which has no "
                "moments; expected none. Make the parameter floating, or take its gradient with "
                "jax.grad(..., allow_int=True), which gives float0 there."
            )
        if jnp.issubdtype(update.dtype, jnp.complexfloating) and not jnp.issubdtype(
            dtype_of(param), jnp.complexfloating
        ):
            raise ValueError(
                f"{caller}: {at}{found} for a parameter of {dtype_of(param)}, whose step would "
                "lose the imaginary part; expected a real one. Take jnp.real of it, or make the "
                "parameter complex."
            )


def _located(tree: PyTree) -> tuple[list[Any], Any]:
    return jax.tree_util.tree_flatten_with_path(tree)


def _fits(located: list[Any], column: list[Any], free: bool) -> bool:
    return all(
        _matches(leaf, other, free) if takes_part(leaf) else not _is_moment(other)
        for (_, leaf), other in zip(located, column, strict=True)
    )


def _is_moment(other: Any) -> bool:
    return hasattr(other, "dtype") and takes_part(other)


def _matches(leaf: Any, other: Any, free: bool) -> bool:
    if isinstance(other, bool):
        return True  # a flag of the leaf, not an array
    if not (hasattr(other, "shape") or jnp.isscalar(other)):
        return False
    shape, found = jnp.shape(leaf), jnp.shape(other)
    return shape == found or (
        free
        and len(shape) == len(found)
        and all(n in (1, m) for n, m in zip(found, shape, strict=True))
    )


def _misfit(located: list[Any], updates: PyTree, name: str, other: PyTree, free: bool) -> str:
    remedy = (
        "Shapes are never broadcast. Pass gradients of the very parameters that `init` was given, "
        "or call `init` again for the new ones."
    )
    found = {
        jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in located if takes_part(leaf)
    }
    wanted = {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(other)[0]
    }
    for path, shape in found.items():
        if (
            path in wanted
            and wanted[path] != shape
            and not (free and len(shape) == len(wanted[path]))
        ):
            return (
                f"{_at(path)}the gradient has shape {shape}, but {name} has shape "
                f"{wanted[path]}. {remedy}"
            )
    for path, leaf in located:
        name_of = jax.tree_util.keystr(path)
        if not takes_part(leaf) and name_of in wanted:
            return (
                f"{_at(name_of)}the gradient has dtype {dtype_of(leaf)}, but {name} is "
                "floating there; expected a floating gradient, of the very parameters that `init` "
                "was given."
            )
    extra, missing = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    says = [f"leaves with a gradient that {name} does not have: {some(extra, 3)}"] if extra else []
    says += [f"leaves of {name} without a gradient: {some(missing, 3)}"] if missing else []
    if not says:
        says = [
            f"the gradients are {str(jax.tree.structure(updates))[:200]}, {name} is "
            f"{str(jax.tree.structure(other))[:200]}"
        ]
    return f"the gradients' tree is not that of {name}: {'; '.join(says)}. {remedy}"


def _at(path: str) -> str:
    return f"at leaf {path} " if path else ""


def narrow(
    updates: PyTree, gradient: PyTree, params: PyTree | None, rounded: bool = False
) -> PyTree:
    """Rounds updates, once, to the wider of the dtypes of `gradient` and `params`.

    The update of an integer leaf is zero: in its parameter's dtype, since `float0` cannot be added
    and `optax.apply_updates` would stop at it. Without `params` a `float0` stays what it is.

    Args:
      updates: what the stages made, float32 or wider.
      gradient: a tree whose leaves have the gradients' dtypes.
      params: the parameters. Without them the dtypes are those of `gradient`.
      rounded: whether the updates of half-precision parameters step from number to number. These
        stay as they are.
    """

    def leaf(u: Array, g: Any, p: Any) -> Array:
        return u if rounded and is_half(p) else u.astype(leaving_dtype(g, p))

    narrowed = lift(leaf, updates, incoming=gradient, params=params)

    def still(u: Any, p: Any = None) -> Any:
        if takes_part(u) or (p is None and dtype_of(u) == dtypes.float0):
            return u
        return jnp.zeros(jnp.shape(u), dtype_of(u if p is None else p))

    return jax.tree.map(still, narrowed, *([] if params is None else [params]))
