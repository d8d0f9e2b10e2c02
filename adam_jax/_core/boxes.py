"""What Flax's boxes say about the axes of the arrays in them.

`nn.Partitioned` of linen and `nnx.Variable` keep a name per axis, by which Flax shards an array. A
state is made of the boxes of parameters. Where an array of the state has another shape than its
parameter, the names of the axes that it does not have must go.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from adam_jax._core.leaves import PyTree
from adam_jax._core.paths import is_box

METADATA = ("out_sharding", "sharding_names", "sharding", "optimizer_sharding")
"""The metadata in which versions of NNX keep the names of axes. Boxes of linen have `names`."""


def names_of_axes(box: Any) -> tuple[Any, ...]:
    """Returns what a box calls the axes of its array; `()` where it does not say."""
    return next(filter(None, map(_as_tuple, _said(box).values())), ())


def without_shared_names(tree: PyTree) -> PyTree:
    """Returns a tree in which no box names an axis of size 1.

    A ν that a block shares has size 1 where its parameter has more. Nothing can be sharded there.
    """

    def unnamed(node: Any) -> Any:
        if not is_box(node):
            return node
        shape = next((leaf.shape for leaf in jax.tree.leaves(node)), ())
        changed = {}
        for attribute, names in _said(node).items():
            axes = _as_tuple(names)
            kept = tuple(None if n == 1 else name for name, n in zip(axes, shape, strict=False))
            if kept != axes[: len(kept)]:
                changed[attribute] = _like(names, (*kept, *axes[len(kept) :]))
        if not changed:
            return node
        # Older versions of NNX replace nothing without a value; linen's boxes take none.
        value = jax.tree.leaves(node)[:1] if hasattr(node, "get_metadata") else []
        return node.replace(*value, **changed)

    return jax.tree.map(unnamed, tree, is_leaf=is_box)


def in_boxes_of(tree: PyTree, like: PyTree) -> PyTree:
    """Returns the leaves of a tree in the boxes of another one, whose names may differ.

    Trees without boxes, and trees with other numbers of leaves, are returned as they are: `lift`
    says in what these differ.
    """
    structure: Any
    nodes, structure = jax.tree.flatten(tree, is_leaf=is_box)
    held, boxes = map(_not_empty, (nodes, jax.tree.leaves(like, is_leaf=is_box)))
    if not any(map(is_box, nodes)) or len(held) != len(boxes):
        return tree
    given = iter(boxes)
    return structure.unflatten(
        [_in_box(node, next(given)) if jax.tree.leaves(node) else node for node in nodes]
    )


def _not_empty(nodes: list[Any]) -> list[Any]:
    return [node for node in nodes if jax.tree.leaves(node)]


def _in_box(node: Any, box: Any) -> Any:
    leaves: list[Any] = jax.tree.leaves(node)
    structure: Any = jax.tree.structure(box)
    fits = is_box(node) and is_box(box) and len(leaves) == structure.num_leaves
    return structure.unflatten(leaves) if fits else node


def _said(box: Any) -> dict[str, Any]:
    """Returns the names of axes by the attribute of the box that has them."""
    metadata = box.get_metadata() if hasattr(box, "get_metadata") else {}
    found = {"names": getattr(box, "names", None)} | {key: metadata.get(key) for key in METADATA}
    return {attribute: names for attribute, names in found.items() if _as_tuple(names)}


def _as_tuple(names: Any) -> tuple[Any, ...]:
    spec = names.spec if isinstance(names, NamedSharding) else names
    return tuple(spec) if isinstance(spec, (tuple, PartitionSpec)) else ()


def _like(names: Any, axes: tuple[Any, ...]) -> Any:
    """Returns names of axes as the type that a box had them in."""
    if not isinstance(names, (NamedSharding, PartitionSpec)):
        return axes
    spec = PartitionSpec(*axes)  # type: ignore[no-untyped-call]
    if isinstance(names, PartitionSpec):
        return spec
    return NamedSharding(names.mesh, spec, memory_kind=names.memory_kind)
