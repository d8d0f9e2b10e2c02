"""How the axes of a PyTorch array lie in a leaf of ours, and where shapes cannot tell."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from adam_jax._core.errors import brief, some

Axes: TypeAlias = tuple[int, ...]

Convert: TypeAlias = Callable[[np.ndarray], np.ndarray]

Layout: TypeAlias = str | Axes | tuple[Convert, Convert]

Layouts: TypeAlias = Mapping[str, Layout] | Callable[[str, str], Layout | None]

WORDS = ("same", "kernel", "rule")
"""What an entry of `transpose` can say in one word."""

ELEMENTWISE = ("embedding", "scale", "bias", "mean", "var")
"""The last parts of paths of leaves that lie as in PyTorch in every framework."""

T = TypeVar("T")


class LayoutWarning(UserWarning):
    """Shapes do not tell how some leaves lie in PyTorch, and nothing was said.

    Attributes:
      leaves: the paths of all of them. The message has the first ones.
    """

    def __init__(self, message: str, leaves: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.leaves = tuple(leaves)


class Way(NamedTuple):
    """How an array goes there and back.

    Attributes:
      there: makes of PyTorch's array ours.
      back: the inverse.
      axes: the permutation that `there` is; `None` for functions of the user.
      told: whether the user said it.
      heads: how many heads one axis of our leaf has, beside the size of each; `None` if none.
    """

    there: Convert
    back: Convert
    axes: Axes | None
    told: bool
    heads: int | None = None

    def merged(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes that a leaf can have whose heads are one axis with the size of each."""
        return [
            (*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :])
            for i in range(len(shape) - 1)
            if shape[i] == self.heads
        ]


def entry_of(table: Mapping[str, T], names: Iterable[str]) -> T | None:
    """Returns the entry of a table for a parameter that has several names.

    It is under one of the names itself, or under a pattern of all of it.
    """
    names = list(names)
    exact = next((table[name] for name in names if name in table), None)
    if exact is not None:
        return exact
    return next(
        (its for key, its in table.items() if any(re.fullmatch(key, name) for name in names)), None
    )


def expect_patterns(table: Any, what: str, caller: str) -> None:
    """Refuses a key that is no pattern.

    Raises:
      ValueError: for such a key.
    """
    for pattern in table if isinstance(table, Mapping) else ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{caller}: {what}: found {pattern!r}, {error}; expected a name of PyTorch or a "
                "regular expression of whole names, such as '.*c_attn.weight'."
            ) from error


def unused_of(table: Any, names: Iterable[str]) -> list[str]:
    """Returns the keys of a table that no name has."""
    names = list(names)
    keys = table if isinstance(table, Mapping) else ()
    return sorted(key for key in keys if not any(key == n or re.fullmatch(key, n) for n in names))


def way_of(
    names: Sequence[str],
    path: str,
    ndim: int,
    transpose: Layouts | None,
    heads: Mapping[str, int] | None,
    caller: str,
) -> Way:
    """Returns the way between an array of PyTorch and the leaf at `path`, of `ndim` axes.

    The names are PyTorch's, and the same without what wraps the model.

    Raises:
      ValueError: for an entry that is none.
    """
    name = names[0]
    given = transpose(name, path) if callable(transpose) else entry_of(transpose or {}, names)
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(map(callable, given)):
        there, back = given
        return Way(there, back, None, True)  # type: ignore[arg-type]
    count = entry_of(heads or {}, names) if ndim > 1 else None
    ndim -= count is not None
    word = given if isinstance(given, str) else "rule"
    kernel = word == "kernel" or (word == "rule" and path.rpartition("/")[2] == "kernel")
    axes: Any = _as_kernel(ndim) if kernel else tuple(range(ndim))
    if given is not None and not isinstance(given, str):
        axes = given
    if (
        word not in WORDS
        or not isinstance(axes, (tuple, list))
        or any(map(callable, axes))
        or sorted(axes) != list(range(ndim))
    ):
        raise ValueError(
            f"{caller}: transpose: found {brief(given)} for {name}; expected a permutation of the "
            f"{ndim} axes, one of {', '.join(map(repr, WORDS))}, or a pair of functions, there "
            "and back, such as after_flatten(shape)."
        )
    inverse = np.argsort(axes).tolist()
    axes = tuple(axes)
    there, back = (lambda x: x.transpose(axes)), (lambda x: x.transpose(inverse))
    return Way(there, back, axes, given is not None, count)


def _as_kernel(ndim: int) -> Axes:
    """The axes of a kernel: PyTorch's first two last, (out, in, …) to (…, in, out)."""
    return (*range(2, ndim), 1, 0) if ndim > 1 else tuple(range(ndim))


def word_that_fits(shape: tuple[int, ...], leaf: tuple[int, ...]) -> str | None:
    """Returns the word under which a shape of PyTorch becomes that of a leaf; `None` if none."""
    n = len(shape)
    fits = {"same": tuple(range(n)), "kernel": _as_kernel(n)}
    return next((word for word, axes in fits.items() if _moved(shape, axes) == leaf), None)


def _moved(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    return tuple(shape[i] for i in axes)


def is_open(path: str, leaf: tuple[int, ...], way: Way) -> bool:
    """Returns whether the array of a leaf could as well lie in another way that people use.

    Args:
      path: of the leaf.
      leaf: its shape, as it is behind `way`.
      way: how it was taken to lie.
    """
    if way.told or way.axes is None or path.rpartition("/")[2] in ELEMENTWISE:
        return False
    if way.heads is not None:
        options = way.merged(leaf)
        return len(options) > 1 or any(is_open(path, o, way._replace(heads=None)) for o in options)
    shape = [0] * len(leaf)
    for place, axis in enumerate(way.axes):
        shape[axis] = leaf[place]

    def effect(axes: Axes) -> Axes:
        return tuple(i for i in axes if shape[i] > 1)  # an axis of size 1 may stand anywhere

    others = (axes for axes in _plausible(len(leaf)) if _moved(tuple(shape), axes) == leaf)
    return any(effect(axes) != effect(way.axes) for axes in others)


def _plausible(ndim: int) -> set[Axes]:
    """The ways in which people lay arrays.

    As they are, or as kernels, with inputs and outputs in either order, or as kernels in layers.
    """
    rest = tuple(range(2, ndim))
    if ndim < 2:
        return {tuple(range(ndim))}
    ways = {(0, 1, *rest), (1, 0, *rest), (*rest, 1, 0), (*rest, 0, 1)}
    if ndim > 2:
        ways.add((0, *(axis + 1 for axis in _as_kernel(ndim - 1))))
    return ways


def warn_of_open(found: Mapping[str, Way], caller: str) -> None:
    """Warns of the leaves whose layout shapes do not tell, by path with the way that was taken."""
    if not found:
        return
    moved = [path for path, way in found.items() if way.axes != tuple(range(len(way.axes or ())))]
    stayed = [path for path in found if path not in moved]
    taken, most = [], 2 if moved and stayed else 4
    if moved:
        taken.append(f"Taken as kernels, with PyTorch's first two axes last: {some(moved, most)}.")
    if stayed:
        taken.append(f"Taken to lie as in PyTorch: {some(stayed, most)}.")
    count = "1 leaf lies" if len(found) == 1 else f"{len(found)} leaves lie"
    message = (
        f"{caller}: shapes do not tell how {count}. {' '.join(taken)} If all of this is right, say "
        "transpose={'.*': 'rule'}. Otherwise say for PyTorch's names, or patterns of them, "
        "'kernel' (Linear to Flax, or to a `w` of Haiku) or 'same' (Conv1D of GPT-2), as in "
        "transpose={'.*c_fc.weight': 'same'}."
    )
    # The functions that call this are called by the user.
    warnings.warn(LayoutWarning(message, list(found)), stacklevel=3)


def after_flatten(shape: Sequence[int]) -> tuple[Convert, Convert]:
    """The entry for `transpose` of a dense layer behind a flattened image.

        transpose={"fc.weight": adam_jax.migrate.after_flatten((16, 4, 4))}

    PyTorch flattens (channels, height, width) and Flax (height, width, channels): the same numbers
    in another order, which the layer's rows have to follow. Without it the shapes agree, and the
    outputs do not.

    Args:
      shape: what PyTorch flattens: the channels first, then one size for each axis of the image.

    Returns:
      A pair of functions: (out, channels·height·width) to (height·width·channels, out), and back.

    Raises:
      ValueError: for what are no sizes.
    """
    if (
        not isinstance(shape, (tuple, list))
        or not shape
        or not all(isinstance(n, int) and n > 0 for n in shape)
    ):
        raise ValueError(
            f"after_flatten: found {shape!r}; expected the sizes that PyTorch flattens, such as "
            "(16, 4, 4)."
        )
    channels, *sizes = shape
    n = len(sizes)

    def there(x: np.ndarray) -> np.ndarray:
        return (
            x.reshape(len(x), channels, *sizes)
            .transpose(*range(2, n + 2), 1, 0)
            .reshape(-1, len(x))
        )

    def back(x: np.ndarray) -> np.ndarray:
        return (
            x.reshape(*sizes, channels, x.shape[-1])
            .transpose(n + 1, n, *range(n))
            .reshape(x.shape[-1], -1)
        )

    return there, back


def as_real(axes: Sequence[int] | None = None) -> tuple[Convert, Convert]:
    """The entry for `transpose` of a complex parameter whose leaf holds both parts.

        transpose={"w": adam_jax.migrate.as_real()}

    PyTorch's optimizers look at complex parameters through `torch.view_as_real`: each part has its
    own ν. A real leaf with a last axis of 2 has that too, and nothing is lost.

    Args:
      axes: how the axes of PyTorch's array come to lie, as `np.transpose` takes them; as they are
        by default. The axis of the parts stays last.

    Returns:
      A pair of functions: complex (…) to real (…, 2), and back.
    """

    def there(x: np.ndarray) -> np.ndarray:
        moved = x if axes is None else x.transpose(axes)
        return np.stack([moved.real, moved.imag], axis=-1)

    def back(x: np.ndarray) -> np.ndarray:
        both = x[..., 0] + np.asarray(1j, np.result_type(x.dtype, np.complex64)) * x[..., 1]
        return np.asarray(both if axes is None else both.transpose(np.argsort(axes)))

    return there, back
