"""Which leaves weight decay is for: matrices, told from biases and the scales of norms.

A shape does not tell. The bias of Flax's attention is (heads, head_dim), that of Equinox's `Conv2d`
(channels, 1, 1), and in stacked layers every bias has an axis more. What a leaf is stands in its
name and in that of its module. Sizes are not looked at: inside `jax.shard_map` an axis of many
elements may have one.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from adam_jax._core.layers import LayerAxes, layer_axes_in
from adam_jax._core.leaves import PyTree
from adam_jax._core.paths import is_box, path_of, paths

VECTORS = {"bias", "biases", "beta", "gamma", "scale", "scales", "offset", "offsets"}
"""Words in the names of biases and scales."""

MATRICES = {"kernel", "kernels", "embedding", "embeddings", "embed", "table", "wte", "wpe"}
"""Words in the names of matrices, wherever these stand."""

WEIGHTS = {"weight", "weights", "w"}
"""Words in the names of matrices, and of the scales of norms."""

NORMS = ("norm", "norms", "rms", "normalization")
"""How words in the names of norms end."""

SHORT_NORMS = {"ln", "bn", "gn"}
"""Words for norms that are too short to be looked for at the ends of others."""


class Decision(NamedTuple):
    """Whether a leaf decays.

    Attributes:
      decays: whether it does.
      why: what that follows from, in a few words.
    """

    decays: bool
    why: str


def decide(params: PyTree, layer_axes: LayerAxes | None = None) -> list[Decision]:
    """Decides for each leaf whether it is a matrix, in order.

    The first of these rules that applies decides:

    1. With fewer than two axes, besides those of `layer_axes`, it is none.
    2. By its name it is a bias or a scale: "bias", "scale", "offset", "beta", "gamma".
    3. By its name it is a matrix: "kernel", "embedding".
    4. Its module is a norm, by its class (`eqx.nn.LayerNorm`) or its name ("ln_1").
    5. By its name it is a matrix: "weight", "w".
    6. It is called "b" beside a "w".
    7. Otherwise it is taken for a matrix, and the reason begins with "unsure".

    Args:
      params: the parameters.
      layer_axes: which axes count layers.
    """
    located = jax.tree_util.tree_flatten_with_path(params)[0]
    axes = layer_axes_in(layer_axes, params)
    names = [path.split("/") for path in paths(params)]
    beside = _names_by_module(params)
    return [
        _decide(np.ndim(leaf) - len(layers), bool(layers), name, _modules(params, keys), beside)
        for (keys, leaf), layers, name in zip(located, axes, names, strict=True)
    ]


def _decide(
    features: int,
    stacked: bool,
    names: list[str],
    modules: list[str],
    beside: dict[tuple[str, ...], set[str]],
) -> Decision:
    if features < 2:
        besides = " besides layers" if stacked else ""
        return Decision(False, f"{features} {'axis' if features == 1 else 'axes'}{besides}")
    *parents, name = _without_indices(names)
    parts = _words(name)
    if VECTORS & set(parts):
        return Decision(False, f"called {name!r}")
    if MATRICES & set(parts):
        return Decision(True, f"called {name!r}")
    norm = next(filter(_is_norm, modules), None) or next(filter(_is_norm, parents[-1:]), None)
    if norm is not None:
        return Decision(False, f"of the norm {norm!r}")
    if WEIGHTS & set(parts):
        return Decision(True, f"called {name!r}")
    siblings = beside.get(tuple(names[:-1]), set())
    if name[0:1] == "b" and parts[0:1] == ["b"]:
        weight = next((s for s in sorted(siblings) if _words(s)[0:1] == ["w"]), None)
        if weight is not None:
            return Decision(False, f"called {name!r} beside {weight!r}")
    return Decision(True, f"unsure: {features} axes, and no name that tells")


def _without_indices(names: list[str]) -> list[str]:
    """Returns the names on a path that are no numbers, at least one."""
    return [name for name in names if not name.isdecimal()] or [""]


def _words(name: str) -> list[str]:
    """Returns the words of a name in lower case: "LayerNorm_0" has "layer", "norm" and "0"."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def _is_norm(name: str) -> bool:
    """Whether a name says that it is a norm, by its first word or its last.

    "norm_mlp", "ln_1" and "input_layernorm" do; "NormalBlock" and "attention_norm_block" do not.
    """
    parts = [word for word in _words(name) if not word.isdecimal()]
    return any(word in SHORT_NORMS or word.endswith(NORMS) for word in (*parts[:1], *parts[-1:]))


def _modules(params: PyTree, keys: tuple[Any, ...]) -> list[str]:
    """Returns the name of the class that a leaf is a field of, or nothing where that is not seen.

    Of a leaf in a list, it is that of which the list is a field.
    """
    node, owner = params, None
    for key in keys:
        if is_box(node):
            break  # Flax's: to read its field is a warning
        owner = node if isinstance(key, GetAttrKey) else owner
        try:
            if isinstance(key, GetAttrKey):
                node = getattr(node, key.name)
            elif isinstance(key, DictKey):
                node = node[key.key]
            elif isinstance(key, SequenceKey):
                node = node[key.idx]
            else:
                return []
        except (AttributeError, KeyError, IndexError, TypeError):
            return []  # a tree whose keys are no way to its nodes
    return [] if owner is None else [type(owner).__name__]


def _names_by_module(params: PyTree) -> dict[tuple[str, ...], set[str]]:
    """Returns what stands beside each leaf: the last names on paths, by the names before them.

    Leaves of other groups are masked, and have a name nevertheless.
    """

    def empty(node: Any) -> bool:
        return node is None or isinstance(node, optax.MaskedNode)

    located = jax.tree_util.tree_flatten_with_path(params, is_leaf=empty)[0]
    found: dict[tuple[str, ...], set[str]] = {}
    for keys, _ in located:
        *module, name = path_of(keys).split("/")
        found.setdefault(tuple(module), set()).add(name)
    return found
