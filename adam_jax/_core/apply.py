"""`apply_updates`: parameters, moved by updates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, dtypes

from adam_jax._core.errors import brief
from adam_jax._core.leaves import PyTree, dtype_of, takes_part, wider_dtype


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Returns params + updates.

    Each sum is formed in the wider of the two dtypes and rounded once to the parameter's.
    `optax.apply_updates` gives the same numbers. It stops at the typed keys of `jax.random`, and at
    updates of another dtype under strict promotion.

    Args:
      params: the parameters, or a whole module: where the updates are `None`, as in
        `eqx.filter(model, eqx.is_array)`, anything may stand, and stays.
      updates: what `update` returned: a tree like the parameters.

    Returns:
      Parameters of the same shapes and dtypes.

    Raises:
      ValueError: if the trees or the shapes of two leaves differ.
    """

    def leaf(keys: Any, update: Any, param: Any) -> Any:
        if update is None or not hasattr(update, "dtype") or update.dtype == dtypes.float0:
            return param
        if jnp.shape(update) != jnp.shape(param):
            at = jax.tree_util.keystr(keys)
            raise ValueError(
                f"apply_updates: {f'at leaf {at} ' if at else ''}found an update of shape "
                f"{jnp.shape(update)} for a parameter of shape {jnp.shape(param)}; expected the "
                "same."
            )
        return _moved(param, update)

    try:
        return jax.tree_util.tree_map_with_path(leaf, updates, params, is_leaf=lambda x: x is None)
    except ValueError as error:
        if str(error).startswith("apply_updates"):
            raise
        raise ValueError(
            f"apply_updates: found parameters {_tree(params)} and updates {_tree(updates)}, of "
            "different trees; expected apply_updates(params, updates), in this order, with what "
            "`update` returned first."
        ) from error


def _moved(param: Any, update: Any) -> Array:
    if not takes_part(param):
        extended = jnp.issubdtype(dtype_of(param), dtypes.extended)
        return param if extended else jnp.asarray(param) + jnp.asarray(update, dtype_of(param))
    dtype = dtype_of(param)
    wide = wider_dtype(param, update) if takes_part(update) else dtype
    return (jnp.asarray(param, wide) + jnp.asarray(update, wide)).astype(dtype)


def _tree(tree: PyTree) -> str:
    return f"a {type(tree).__name__}" if isinstance(tree, (dict, list)) else brief(tree)
