"""Parameters of PyTorch that are cut into several leaves, and layers that become one leaf."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from adam_jax._core.errors import brief, some
from adam_jax.migrate.torch_layout import unused_of
from adam_jax.migrate.torch_names import Names, cut_name, number_array

Stacks: TypeAlias = Mapping[str, int]

Heads: TypeAlias = Mapping[str, int]


class Split(NamedTuple):
    r"""An entry of `split`: how one parameter of PyTorch becomes several.

        split={r"(.*)\.c_attn\.(.*)": Split((r"\1.q.\2", r"\1.k.\2", r"\1.v.\2"), axis=-1)}

    Attributes:
      names: what the parts are called. They stand for names of PyTorch from then on.
      axis: the axis of PyTorch's array that is cut. 0 is that of the outputs of a Linear, and -1
        that of a Conv1D of GPT-2, for its weight and its bias.
      sizes: the sizes of the parts there; equal ones if there are none.
    """

    names: Sequence[str]
    axis: int = 0
    sizes: Sequence[int] | None = None


Splits: TypeAlias = Mapping[str, Sequence[str] | Split]


class Layer(NamedTuple):
    """A parameter that is one of several layers.

    Attributes:
      name: without the number of the layer.
      axis: of the layers in our leaf.
      number: which layer it is.
    """

    name: str
    axis: int
    number: int


def layer_of(name: str, stack: Stacks | None) -> Layer | None:
    """Returns which layer a parameter is of, where its beginning is in a table."""
    for start, axis in (stack or {}).items():
        match = re.match(re.escape(start.rstrip(".")) + r"\.(\d+)(?=\.|$)", name)
        if match:
            rest = name[match.end() :]
            return Layer(start.rstrip(".") + rest, axis, int(match[1]))
    return None


class Parts:
    """The parts of parameters, by the names of PyTorch.

    Args:
      names: of all parameters.
      split: the user's table.
      mapping: the user's, which may cut off what wraps a model.
      caller: the function that the user called.
      whole: whether the names are all; then every entry has to have one.

    Raises:
      TypeError: for an entry that is none.
      ValueError: for an entry that no name has, and for parts that are called like another one.
    """

    def __init__(
        self,
        names: Iterable[str],
        split: Splits | None,
        mapping: Names | None,
        caller: str,
        whole: bool = True,
    ) -> None:
        self._caller = caller
        self._made: dict[str, Split | None] = {}
        names = list(names)
        for name in names:
            self._made[name] = _split_of(name, split, mapping, caller)
        known = [*names, *(cut_name(name, mapping) for name in names)]
        if whole and (unknown := unused_of(split, known)):
            raise ValueError(
                f"{caller}: found {some(unknown)} in split, which is no name of PyTorch's here; "
                f"expected names such as {some(names)}."
            )
        every = [part for name in names for part in self(name)]
        if len(set(every)) < len(every):
            twice = sorted({part for part in every if every.count(part) > 1})
            raise ValueError(
                f"{caller}: split: found that several parts are called {some(twice)}; expected "
                "another name for each."
            )

    def __call__(self, name: str) -> Sequence[str]:
        """The names of the parts of a parameter; its own name if it is not cut."""
        its = self._made[name]
        return [name] if its is None else its.names

    def cut(self, name: str, tensor: Any) -> dict[str, Any]:
        """The parts of an array by name."""
        its = self._made[name]
        if its is None:
            return {name: tensor}
        x = number_array(tensor, name, self._caller)
        if not -x.ndim <= its.axis < x.ndim:
            raise self._wrong(name, x, its)
        size, count = x.shape[its.axis], len(its.names)
        sizes = list(its.sizes) if its.sizes is not None else [size // count] * count
        if sum(sizes) != size:
            raise self._wrong(name, x, its)
        ends = np.cumsum(sizes)[:-1].tolist()
        return dict(zip(its.names, np.split(x, ends, axis=its.axis), strict=True))

    def _wrong(self, name: str, x: np.ndarray, its: Split) -> ValueError:
        sizes = "equal parts" if its.sizes is None else f"parts of {tuple(its.sizes)}"
        return ValueError(
            f"{self._caller}: split: found the shape {x.shape} of {name}; expected one that has "
            f"{len(its.names)} {sizes} along axis {its.axis}. Say another: Split(names, axis, "
            "sizes)."
        )

    def join(self, name: str, part_of: Callable[[str], np.ndarray]) -> np.ndarray:
        """The array of a parameter, of a function from the names of parts to theirs."""
        its = self._made[name]
        if its is None:
            return part_of(name)
        return np.concatenate([part_of(part) for part in its.names], axis=its.axis)


def _split_of(name: str, split: Splits | None, mapping: Names | None, caller: str) -> Split | None:
    """The entry for a name, with the names of its parts written out."""
    for own in (name, cut_name(name, mapping)):
        for key, entry in (split or {}).items():
            match = re.fullmatch(key, own) if key != own else None
            if key != own and match is None:
                continue
            made = entry if isinstance(entry, Split) else Split(entry)
            strings = isinstance(made.names, (tuple, list)) and all(
                isinstance(part, str) for part in made.names
            )
            if not strings or not made.names:
                raise TypeError(
                    f"{caller}: split: found {brief(entry)} for {key!r}; expected the names of the "
                    "parts, or Split(names, axis, sizes)."
                )
            if made.sizes is not None and len(made.sizes) != len(made.names):
                raise ValueError(
                    f"{caller}: split: found {len(made.sizes)} sizes for {len(made.names)} names "
                    f"of {key!r}; expected one each."
                )
            try:
                parts = [match.expand(part) if match else part for part in made.names]
            except (re.error, IndexError) as error:
                raise ValueError(
                    f"{caller}: split: found names of parts for {key!r} that its pattern does not "
                    f"fill, {error}; expected \\1 for what is in its first parentheses."
                ) from error
            return made._replace(names=parts)
    return None
