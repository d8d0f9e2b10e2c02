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
from adam_jax.migrate.torch_names import Names, expect_table
from adam_jax.migrate.torch_pairs import (
    expect_all_parts,
    gathered,
    open_ways,
    pairs_of,
)
from adam_jax.migrate.torch_parts import Heads, Parts, Splits, Stacks
from adam_jax.migrate.torch_rules import Rules, expect_rules


def params_from_torch(
    state_dict: Mapping[str, Any],
    params: PyTree,
    *,
    mapping: Names | None = None,
    transpose: Layouts | None = None,
    split: Splits | None = None,
    stack: Stacks | None = None,
    heads: Heads | None = None,
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
      split: as in `from_torch`.
      stack: as in `from_torch`.
      heads: as in `from_torch`.

    Returns:
      A tree like `params`, of new arrays.

    Raises:
      TypeError: for what is no state dict (we load no files), or no tensor.
      ValueError: for names that are missing, left over, or meet in one leaf, and shapes that differ
        once transposed.
    """
    caller = "params_from_torch"
    expect_table(state_dict, caller)
    leaves, rules = by_its_path(params), Rules(mapping, transpose, split, stack, heads)
    expect_rules(rules, caller)
    parts = Parts(state_dict, split, mapping, caller)
    tensors = {
        part: x for name in state_dict for part, x in parts.cut(name, state_dict[name]).items()
    }
    pairs = pairs_of(tensors, leaves, rules, caller, tied=True)
    made: dict[str, np.ndarray] = {}
    first: dict[Any, np.ndarray] = {}
    for name, pair in pairs.items():
        array = made[name] = pair.into(tensors[name], leaves[pair.path], caller)
        place = pair.path, pair.layer
        if not np.array_equal(first.setdefault(place, array), array, equal_nan=True):
            raise ValueError(
                f"{caller}: found that {name!r} and another name are both mapped to {pair.path}, "
                "and differ; expected one for each leaf, or weights that are tied. Layers become "
                "one leaf with stack={'layers': 0}."
            )
    tied = {(pair.path, pair.layer): pair for pair in pairs.values()}
    found = gathered(tied.values(), made)
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
    split: Splits | None = None,
    stack: Stacks | None = None,
    heads: Heads | None = None,
) -> dict[str, Any]:
    """The way back of `params_from_torch`.

        found = adam_jax.migrate.params_to_torch(params, model.state_dict(), **rules)
        model.load_state_dict({name: torch.tensor(x) for name, x in found.items()})

    Args:
      params: parameters.
      like: `model.state_dict()`, or a part of it: the names and shapes.
      mapping: as in `from_torch`, from PyTorch's names to ours.
      transpose: as in `from_torch`, from PyTorch's arrays to ours.
      split: as in `from_torch`.
      stack: as in `from_torch`.
      heads: as in `from_torch`.

    Returns:
      NumPy arrays by PyTorch's names, and what has no place in `params` as it is in `like`.

    Raises:
      TypeError: if `like` is no state dict.
      ValueError: as `params_from_torch`.
    """
    caller = "params_to_torch"
    expect_table(like, caller)
    leaves, rules = by_its_path(params), Rules(mapping, transpose, split, stack, heads)
    expect_rules(rules, caller)
    found, parts = dict(like), Parts(like, split, mapping, caller)
    tensors = {p: x for name, its in like.items() for p, x in parts.cut(name, its).items()}
    pairs = pairs_of(tensors, leaves, rules, caller, tied=True)
    for name, pair in pairs.items():
        pair.into(tensors[name], leaves[pair.path], caller)  # an error where shapes differ

    def part_of(name: str) -> np.ndarray:
        leaf = leaves[pairs[name].path]
        # PyTorch takes no array in a dtype of ml_dtypes.
        wide = np.float32 if leaf.dtype == jnp.bfloat16 else None
        return pairs[name].out_of(np.asarray(leaf, wide), caller)

    for name in like:
        if expect_all_parts(parts(name), pairs, name, caller):
            found[name] = parts.join(name, part_of)
    warn_of_open(open_ways(pairs.values(), leaves), caller)
    return found
