"""How updates are added to parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import dtypes

from adam_jax._core.errors import some
from adam_jax._core.leaves import PyTree, dtype_of, takes_part, wider_dtype


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Adds updates to parameters, and gives each sum the dtype of its parameter.

    It does what `optax.apply_updates` does, and three things more. It takes an Equinox module as it
    is, functions among its leaves. It takes typed keys of `jax.random`, which stay. And it works
    under `jax.numpy_dtype_promotion("strict")`, where a bfloat16 parameter and the float32 update
    of `round_stochastically()` or `compensate()` have no sum otherwise.

    `eqx.apply_updates` does not cast back: behind these two links it turns a bfloat16 model into a
    float32 one.

        model = apply_updates(model, updates)

    Args:
      params: the parameters, a tree of arrays of any dtypes, or a module of Equinox.
      updates: what `update` returned. A leaf that is `None`, or the update of a leaf that is no
        array of numbers, changes nothing.

    Returns:
      A tree of the structure, shapes and dtypes of `params`. A sum is formed in the wider dtype of
      the two, and is rounded once to that of the parameter.

    Raises:
      ValueError: if a leaf of `updates` has another shape than its parameter, or the trees differ.
    """
    if updates is None and params is not None:
        raise ValueError(
            "apply_updates: found None for updates; expected what `update` returned first."
        )
    misfits: list[str] = []

    def leaf(keys: Any, update: Any, param: Any) -> Any:
        if update is None or param is None or not _adds(param) or not _adds(update):
            return param
        if jnp.shape(update) != jnp.shape(param):
            at = jax.tree_util.keystr(keys)
            misfits.append(f"{at}: {jnp.shape(update)} for {jnp.shape(param)}")
            return param
        if _is_complex(update) and not _is_complex(param):
            raise TypeError(
                f"apply_updates: at {jax.tree_util.keystr(keys)} found an update of "
                f"{dtype_of(update)} for a parameter of {dtype_of(param)}; expected a real one. "
                "Its imaginary part would be lost."
            )
        if not takes_part(param) or not takes_part(update):
            return jnp.asarray(param + update).astype(dtype_of(param))
        wide = wider_dtype(param, update)
        total = jnp.asarray(param, wide) + jnp.asarray(update, wide)
        return total.astype(dtype_of(param))

    try:
        moved = jax.tree_util.tree_map_with_path(
            leaf, updates, params, is_leaf=lambda update: update is None
        )
    except ValueError as error:
        raise ValueError(
            f"apply_updates: found parameters and updates of different trees, a "
            f"{type(params).__name__} and a {type(updates).__name__}"
            f"{_differences(params, updates)}; "
            "expected apply_updates(params, updates), in this order, with what `update` returned "
            "first."
        ) from error
    if misfits:
        raise ValueError(
            f"apply_updates: found updates of other shapes than their parameters, at "
            f"{some(misfits, 3)}; expected equal ones. Pass what `update` returned for these "
            "very parameters."
        )
    return moved


def _differences(params: PyTree, updates: PyTree) -> str:
    """Returns where two trees differ, as an error says it."""
    here, there = (
        {jax.tree_util.keystr(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, updates)
    )
    says = [
        f"{some(sorted(alone), 3)} only among the {name}"
        for name, alone in (("parameters", here - there), ("updates", there - here))
        if alone
    ]
    return f" ({'; '.join(says)})" if says else ""


def _is_complex(leaf: Any) -> bool:
    return bool(jnp.issubdtype(dtype_of(leaf), jnp.complexfloating))


def _adds(leaf: Any) -> bool:
    """Whether a leaf is a number or an array of numbers."""
    if not (hasattr(leaf, "dtype") or jnp.isscalar(leaf)) or isinstance(leaf, (bool, str)):
        return False  # a function or a flag in a module
    dtype = dtype_of(leaf)
    return dtype != dtypes.float0 and bool(jnp.issubdtype(dtype, jnp.number))
