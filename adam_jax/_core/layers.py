"""Which axes of a leaf count layers.

A model of equal layers is often one layer whose arrays have an axis more: Flax's `nn.scan` and
`nnx.vmap` make such models, and `jax.vmap` over an initializer does. A bias then has two axes, and
its shape is that of a matrix. No shape tells the two apart, so the user says it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

from adam_jax._core.boxes import names_of_axes
from adam_jax._core.errors import brief, some
from adam_jax._core.leaves import PyTree
from adam_jax._core.paths import is_box, paths

LayerAxes: TypeAlias = Mapping[str, int | tuple[int, ...]]
"""Axes by patterns: each is a regular expression for a whole path, as in `by_path`."""


def expect_layer_axes(layer_axes: LayerAxes | None) -> None:
    """Checks that layer axes are a mapping from regular expressions to axes.

    Raises:
      TypeError: for another type than a mapping, of the patterns or of the axes.
      ValueError: for a pattern that is no regular expression.
    """
    if layer_axes is None:
        return
    expected = 'expected a mapping from patterns of paths to axes, such as {"layers/.*": 0}'
    if not isinstance(layer_axes, Mapping):
        raise TypeError(f"layer_axes: found {brief(layer_axes)}; {expected}.")
    for pattern, axes in layer_axes.items():
        each = axes if isinstance(axes, tuple) else (axes,)
        whole = all(isinstance(a, (int, np.integer)) and not isinstance(a, bool) for a in each)
        if not isinstance(pattern, str) or not whole:
            raise TypeError(
                f"layer_axes: found {brief(axes)} for the pattern {brief(pattern)}; {expected}."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"layer_axes: found the pattern {pattern!r}; expected a regular expression: "
                f"{error}."
            ) from error


def layer_axes_at(layer_axes: LayerAxes | None, path: str, leaf: Any) -> tuple[int, ...]:
    """Returns the axes of one leaf that count layers, each from 0.

    Args:
      layer_axes: the axes by patterns.
      path: the leaf's path, as `paths` writes it.
      leaf: the leaf, or its shape.

    Raises:
      ValueError: where two patterns match and say different axes, or the leaf has no such axis.
    """
    ndim = np.ndim(leaf)
    matching = {
        pattern: axes if isinstance(axes, tuple) else (axes,)
        for pattern, axes in (layer_axes or {}).items()
        if re.fullmatch(pattern, path)
    }
    said = set()
    for pattern, axes in matching.items():
        for axis in axes:
            if not -ndim <= axis < ndim:
                raise ValueError(
                    f"layer_axes: found axis {axis} for {path!r}, from the pattern {pattern!r}; "
                    f"expected one of its {ndim} axes. Narrow the pattern."
                )
        said.add(tuple(sorted({int(axis) % ndim for axis in axes})))
    if len(said) > 1:
        raise ValueError(
            f"layer_axes: found the patterns {some(list(map(repr, matching)), 3)} with different "
            f"axes for {path!r}; expected one. Make the patterns disjoint."
        )
    return said.pop() if said else ()


def layer_axes_in(layer_axes: LayerAxes | None, tree: PyTree) -> list[tuple[int, ...]]:
    """Returns `layer_axes_at` of each leaf of a tree, in order.

    Raises:
      ValueError: as `layer_axes_at`, and for a pattern that matches no leaf. In a part of a tree,
        which has `optax.MaskedNode` in place of other leaves, a pattern may match none.
    """
    located = paths(tree)
    if layer_axes and not is_part(tree):
        for pattern in layer_axes:
            if located and not any(re.fullmatch(pattern, path) for path in located):
                raise ValueError(
                    f"layer_axes: found no leaf that {pattern!r} matches; expected at least one, "
                    f"and a match of the whole path. Paths are {some(list(map(repr, located)))}."
                )
    leaves = jax.tree.leaves(tree)
    return [layer_axes_at(layer_axes, p, leaf) for p, leaf in zip(located, leaves, strict=True)]


def is_part(tree: PyTree) -> bool:
    """Whether leaves of a tree are masked: a group of `by_path` or of Optax sees such trees."""
    nodes = jax.tree.leaves(tree, is_leaf=_is_masked)
    return any(map(_is_masked, nodes))


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def flax_layer_axes(params: PyTree, name: str = "layers") -> dict[str, int | tuple[int, ...]]:
    """Reads from Flax's boxes which axes count layers, for the argument `layer_axes`.

    `nn.scan(..., metadata_params={nn.PARTITION_NAME: "layers"})` of linen and
    `nnx.vmap(..., transform_metadata={nnx.PARTITION_NAME: "layers"})` name the axis that they add,
    in the boxes of arrays whose other axes have names too (`with_partitioning`). `nnx.Optimizer`
    passes no boxes to `update`, so the names are read once, from the model:

        tx = adamw(1e-3, mask="matrices", layer_axes=flax_layer_axes(nnx.state(model, nnx.Param)))

    Args:
      params: the parameters in their boxes, the tree whose structure `tx.init` is given.
      name: the name of such an axis.

    Returns:
      The axes of each array that has such an axis, by its path.

    Raises:
      ValueError: if no box has an axis of this name.
    """
    nodes = jax.tree.leaves(params, is_leaf=is_box)
    located = iter(paths(params))
    axes = {}
    seen = set()
    for node in nodes:
        for path in [next(located) for _ in jax.tree.leaves(node)]:
            of_node = names_of_axes(node) if is_box(node) else ()
            seen |= {of for of in of_node if isinstance(of, str)}
            layers = tuple(axis for axis, of in enumerate(of_node) if of == name)
            if layers:
                axes[re.escape(path)] = layers[0] if len(layers) == 1 else layers
    if not axes:
        raise ValueError(
            f"flax_layer_axes: found no box with an axis {name!r}; names of axes are "
            f"{some(sorted(map(repr, seen))) or 'in no box'}. Write the paths yourself: "
            'layer_axes={"layers/.*": 0}.'
        )
    return axes
