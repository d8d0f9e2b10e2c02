"""The paths of leaves, in one form for dicts, Flax's trees and Equinox's.

Here is also decided which parameter an array of a state belongs to.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from adam_jax._core.leaves import PyTree

Shape: TypeAlias = tuple[int, ...]

RAW = (GetAttrKey("value"), GetAttrKey("raw_value"))
"""What Flax puts behind the name of a boxed array."""

BOXES = ("Variable", "VariableState", "AxisMetadata")
"""The classes of Flax's boxes."""


def path_of(keys: tuple[Any, ...]) -> str:
    """A leaf's path as people write it: "encoder/layer_0/bias".

    Args:
      keys: as `jax.tree_util.tree_flatten_with_path` gives them.

    Returns:
      Names and indices joined by "/". The box that Flax puts around an array (`nnx.Variable`,
      linen's `Partitioned`) has no name: `nnx.Optimizer` hands boxes to `init` and arrays to
      `update`.
    """
    boxed = len(keys) > 1 and keys[-1] in RAW and isinstance(keys[-2], (DictKey, SequenceKey))
    return "/".join(_name(key) for key in (keys[:-1] if boxed else keys))


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def paths(tree: PyTree) -> list[str]:
    """The paths of all leaves, in order, as `path_of` writes them.

    A field that is called "value" is no box here, and stays.
    """
    return [
        "/".join(map(_name, (*keys, *inside[is_box(node) :])))
        for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)[0]
        for inside, _ in jax.tree_util.tree_flatten_with_path(node)[0]
    ]


def names(tree: PyTree) -> list[str]:
    """The paths of all leaves, each one once.

    "a/b" and a "b" inside of "a" would be one path, and the second is "a/b#1".
    """
    return _each_once(paths(tree))


def _each_once(found: Iterable[str]) -> list[str]:
    seen: Counter[str] = Counter()
    made = []
    for path in found:
        made.append(f"{path}#{seen[path]}" if seen[path] else path)
        seen[path] += 1
    return made


def by_its_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree, by path."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unboxed(tree: PyTree) -> PyTree:
    """The arrays that Flax's boxes hold, in their places."""
    return jax.tree.map(
        lambda node: jax.tree.leaves(node)[0] if is_box(node) else node, tree, is_leaf=is_box
    )


def is_box(node: Any) -> bool:
    """Whether it is what Flax puts around an array, by its classes' names.

    Flax need not be there.
    """
    return any(
        kind.__name__ in BOXES and kind.__module__.startswith("flax.")
        for kind in type(node).__mro__
    )


class Parameters(dict[Any, Shape]):
    """The shapes of parameters by their keys, as `jax.tree_util.tree_flatten_with_path` gives them.

    Args:
      shapes: the shapes.
      scalars: the places in a state that hold nothing for each parameter, as
        `jax.tree_util.keystr` writes them.
    """

    def __init__(self, shapes: Mapping[Any, Shape], scalars: Sequence[str] = ()) -> None:
        super().__init__(shapes)
        self.scalars = tuple(scalars)

    @functools.cached_property
    def by_name(self) -> dict[str, Any]:
        """The keys of each parameter by what `names` calls it."""
        return dict(zip(_each_once(map(path_of, self)), self, strict=True))


def owner(path: Any, shape: Shape, parameters: Parameters) -> Any:
    """The path of the parameter to which an array of a state belongs.

    The longest with which its own ends, if the shapes fit.

    The scales of codes are kept by the name of their parameter, not in a tree like the parameters:
    what goes over such trees, `optax.tree.map_params` and the boxes of Flax, would take them for
    parameters.

    Args:
      path: that of the array.
      shape: that of the array.
      parameters: their shapes by path.
    """
    if is_scale(path):
        return parameters.by_name.get(path[-1].key)
    if parameters.scalars and jax.tree_util.keystr(path).startswith(parameters.scalars):
        return None
    # A scalar needs a name: what ends with no name is as likely a count.
    for start in range(len(path) + bool(shape)):
        whole = parameters.get(path[start:])
        if (
            whole is not None
            and len(whole) == len(shape)
            and all(n in (1, of) for n, of in zip(shape, whole, strict=True))
        ):
            return path[start:]
    return None


def is_scale(path: Any) -> bool:
    """Whether an array of a state is the scale of a leaf's codes."""
    if len(path) < 3:
        return False
    field, moment, name = path[-3:]
    named = (
        isinstance(field, GetAttrKey) and isinstance(moment, DictKey) and isinstance(name, DictKey)
    )
    return named and field.name == "scales" and str(moment.key).endswith("_scale")
