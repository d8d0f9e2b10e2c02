"""`params_from_torch` and `params_to_torch`: PyTorch's parameters and our leaves.

Here is decided which parameter is which leaf, and how its axes lie there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._core.leaves import PyTree
from adam_jax._core.paths import by_its_path, path_of
from adam_jax.migrate.torch_layout import Layouts, warn_of_open
from adam_jax.migrate.torch_names import Names, expect_table, open_ways, pairs_of


def params_from_torch(
    state_dict: Mapping[str, Any],
    params: PyTree,
    *,
    mapping: Names | None = None,
    transpose: Layouts | None = None,
) -> PyTree:
    """Parameters, or the statistics of normalisation, from those of a PyTorch model.

    Args:
      state_dict: `model.state_dict()`, or a part of it such as `dict(model.named_parameters())`;
        tensors or arrays. PyTorch's "num_batches_tracked" has no place in JAX and is left out. Of
        weights that are tied several names may lead to one leaf.
      params: a tree of the parameters' shapes and dtypes, whatever their values: of dicts, of NNX,
        an Equinox module's arrays.
      mapping: as in `from_torch`.
      transpose: as in `from_torch`.

    Returns:
      A tree like `params`, of new arrays.

    Raises:
      TypeError: for what is no state dict (we load no files), or no tensor.
      ValueError: for names that are missing, left over, or meet in one leaf, and shapes that differ
        once transposed.
    """
    caller = "params_from_torch"
    expect_table(state_dict, caller)
    leaves = by_its_path(params)
    found: dict[str, np.ndarray] = {}
    pairs = pairs_of(state_dict, leaves, mapping, transpose, caller, tied=True)
    for name, pair in pairs.items():
        array = pair.into(state_dict[name], leaves[pair.path], caller)
        if not np.array_equal(found.setdefault(pair.path, array), array, equal_nan=True):
            raise ValueError(
                f"{caller}: found that {name!r} and another name are both mapped to {pair.path}, "
                "and differ; expected one for each leaf, or weights that are tied."
            )
    warn_of_open(open_ways(pairs.values(), leaves), caller)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.array(found[path_of(path)], leaf.dtype), params
    )


def params_to_torch(
    params: PyTree,
    like: Mapping[str, Any],
    *,
    mapping: Names | None = None,
    transpose: Layouts | None = None,
) -> dict[str, Any]:
    """The way back of `params_from_torch`.

        found = adam_jax.migrate.params_to_torch(params, model.state_dict(), **rules)
        model.load_state_dict({name: torch.tensor(x) for name, x in found.items()})

    Args:
      params: parameters.
      like: `model.state_dict()`, or a part of it: the names and shapes.
      mapping: as in `from_torch`, from PyTorch's names to ours.
      transpose: as in `from_torch`, from PyTorch's arrays to ours.

    Returns:
      NumPy arrays by PyTorch's names, and what has no place in `params` as it is in `like`.

    Raises:
      TypeError: if `like` is no state dict.
      ValueError: as `params_from_torch`.
    """
    caller = "params_to_torch"
    expect_table(like, caller)
    leaves = by_its_path(params)
    found = dict(like)
    pairs = pairs_of(like, leaves, mapping, transpose, caller, tied=True)
    for name, pair in pairs.items():
        pair.into(
            like[name], leaves[pair.path], caller
        )  # the same shapes, or an error that says which
        leaf = leaves[pair.path]
        # PyTorch takes no array in a dtype of ml_dtypes.
        found[name] = pair.way.back(
            np.asarray(leaf, np.float32) if leaf.dtype == jnp.bfloat16 else np.asarray(leaf)
        )
    warn_of_open(open_ways(pairs.values(), leaves), caller)
    return found
