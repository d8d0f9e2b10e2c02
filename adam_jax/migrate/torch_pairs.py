"""Which parameter of PyTorch, or which part of one, is which leaf, or which layer of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from adam_jax._core.errors import some
from adam_jax._core.leaves import dtype_of
from adam_jax.migrate.torch_layout import (
    Way,
    is_open,
    unused_of,
    way_of,
    word_that_fits,
)
from adam_jax.migrate.torch_names import (
    TAKE_THEM,
    WRAPPERS,
    cut_name,
    number_array,
    options_of,
    target_of,
)
from adam_jax.migrate.torch_parts import layer_of
from adam_jax.migrate.torch_rules import Rules


class Pair(NamedTuple):
    """A parameter of PyTorch and a leaf of ours.

    Attributes:
      name: PyTorch's; of a part of a parameter the name that `split` gives it.
      path: ours.
      way: how its axes go there and back.
      layer: the axis of layers in our leaf, and which one this is; `None` for a whole leaf.
    """

    name: str
    path: str
    way: Way
    layer: tuple[int, int] | None = None

    def shape_in(self, leaf: Any) -> tuple[int, ...]:
        """The shape that this parameter has in its leaf."""
        shape = tuple(jnp.shape(leaf))
        if self.layer is None:
            return shape
        axis = self.layer[0]
        return shape[:axis] + shape[axis + 1 :]

    def into(self, tensor: Any, leaf: Any, caller: str) -> np.ndarray:
        """PyTorch's array as ours lies, without the axis of layers."""
        x, shape = number_array(tensor, self.name, caller), self.shape_in(leaf)
        y: np.ndarray | None = None
        try:
            y = self.way.there(x)
            if self.way.heads is not None:
                y = y.reshape(shape) if y.shape in self.way.merged(shape) else None
        except ValueError:
            pass
        if y is None or y.shape != shape:
            made = "which cannot be transposed so" if y is None else f"transposed {y.shape}"
            heads = f" in {self.way.heads} heads" if self.way.heads else ""
            word = word_that_fits(x.shape, shape)
            raise ValueError(
                f"{caller}: {self.name}: found the shape {x.shape}, {made}{heads}; expected "
                f"{shape}, of {self.path}. If the two are the same parameter, say how it "
                f"has to be transposed: transpose={{{self.name!r}: {repr(word) if word else 'axes'}"
                f"}}.{_of_order(caller)}"
            )
        if y.dtype.kind == "c" and not jnp.issubdtype(dtype_of(leaf), jnp.complexfloating):
            raise ValueError(
                f"{caller}: {self.name}: found {x.dtype}; expected real numbers, as {self.path} "
                "has. A real leaf of shape (…, 2) takes both parts: "
                f"transpose={{{self.name!r}: as_real()}}."
            )
        return y

    def out_of(self, leaf: np.ndarray, caller: str) -> np.ndarray:
        """PyTorch's array from a leaf of ours."""
        x = leaf if self.layer is None else np.take(leaf, self.layer[1], axis=self.layer[0])
        if self.way.heads is not None:
            options = self.way.merged(x.shape)
            if len(options) != 1:
                raise ValueError(
                    f"{caller}: {self.path}: found the shape {x.shape}, in which "
                    f"{self.way.heads} heads are at {len(options)} places; expected one. Give "
                    f"transpose={{{self.name!r}: (there, back)}}, two functions."
                )
            x = x.reshape(options[0])
        return self.way.back(x)


def _of_order(caller: str) -> str:
    """What else a shape can mean that differs, where names come in an order."""
    if caller not in ("from_torch", "to_torch"):
        return ""
    return f" If not, the order of names= is not the optimizer's: {TAKE_THEM}."


def pairs_of(
    names: Iterable[str],
    leaves: Mapping[str, Any],
    rules: Rules,
    caller: str,
    still: Set[str] = frozenset(),
    tied: bool = False,
) -> dict[str, Pair]:
    """Parameters of PyTorch with their leaves, by name, but for those that are left out.

    The leaves in `still` may have no name, and where they may be `tied` several.
    """
    found: dict[str, Pair] = {}
    taken: dict[str, dict[Any, str]] = {}
    mapping, names, lost = rules.mapping, list(names), []
    for name in names:
        path, layer, known = _place_of(name, leaves, rules, caller)
        if path is None:
            lost += [name] if layer and not name.endswith("num_batches_tracked") else []
            continue
        row = layer[1] if isinstance(layer, tuple) else None
        others = taken.setdefault(path, {})
        if ((others and (row is None or None in others)) or row in others) and not tied:
            raise ValueError(
                f"{caller}: found that {next(iter(others.values()))!r} and {name!r} are both "
                f"mapped to {path}; expected one for each leaf. Layers become one leaf with "
                "stack={'layers': 0}."
            )
        others[row] = name
        leaf = jnp.ndim(leaves[path]) - (row is not None)
        way = way_of(known, path, leaf, rules.transpose, rules.heads, caller)
        found[name] = Pair(name, path, way, layer if isinstance(layer, tuple) else None)
    _expect_layers(found, taken, leaves, caller)
    missing = [path for path in leaves if path not in taken and path not in still]
    if lost or missing:
        says = [f"left over {some(lost)} of PyTorch"] if lost else []
        says += [f"missing {some(missing)} of the parameters"] if missing else []
        wrapped = sorted(match[0] for match in map(WRAPPERS.match, lost) if match)
        cut = wrapped and f" What wraps a model is cut off by mapping={{{wrapped[0][:-1]!r}: ''}}."
        raise ValueError(
            f"{caller}: {'; '.join(says)}. Give mapping=, a table or a function from PyTorch's "
            f"names to paths in the parameters, and to None for what has no place there.{cut or ''}"
        )
    # A table may serve other calls too: what leads to a leaf that has no name here is known
    # elsewhere.
    every = {x for name in names for x in _known_as(name, rules)}
    for what, table in [("transpose", rules.transpose), ("heads", rules.heads)]:
        unknown = [
            name
            for name in unused_of(table, every)
            if not {*options_of(target_of(name, mapping, caller) or "")} & still
        ]
        if unknown:
            raise ValueError(
                f"{caller}: found {some(unknown)} in {what}, which is no name of PyTorch's here; "
                f"expected names such as {some(names)}."
            )
    return found


def _known_as(name: str, rules: Rules) -> list[str]:
    """The names under which tables have a parameter: whole, cut, and without its layer."""
    cut = cut_name(name, rules.mapping)
    layer = layer_of(cut, rules.stack)
    return list(dict.fromkeys([name, cut, *([layer.name] if layer else [])]))


def _place_of(
    name: str, leaves: Mapping[str, Any], rules: Rules, caller: str
) -> tuple[str | None, tuple[int, int] | bool, list[str]]:
    """The path of a name, its layer there, and what tables call it.

    A name without a path has `True` in place of the layer if it should have one.
    """
    known = _known_as(name, rules)
    layer = layer_of(known[-1] if len(known) == 1 else cut_name(name, rules.mapping), rules.stack)
    target = target_of(layer.name if layer else name, rules.mapping, caller)
    path = target and next((path for path in options_of(target) if path in leaves), None)
    if not path and path != "":
        return None, bool(target), known
    if layer is None:
        return path, False, known
    ndim = jnp.ndim(leaves[path])
    if not -ndim <= layer.axis < ndim:
        raise ValueError(
            f"{caller}: stack: found the axis {layer.axis} for {name}, and {ndim} axes at {path}; "
            "expected one of them."
        )
    return path, (layer.axis % ndim, layer.number), known


def _expect_layers(
    found: Mapping[str, Pair],
    taken: Mapping[str, Mapping[Any, str]],
    leaves: Mapping[str, Any],
    caller: str,
) -> None:
    """Refuses a leaf of layers that has too many or too few."""
    for path, rows in taken.items():
        if None in rows:
            continue
        pair = found[next(iter(rows.values()))]
        count = jnp.shape(leaves[path])[pair.layer[0]] if pair.layer else 0
        if sorted(rows) != list(range(count)):
            raise ValueError(
                f"{caller}: stack: found the layers {some(list(map(str, sorted(rows))), 8)} for "
                f"{path}; expected 0 to {count - 1}, for axis {pair.layer and pair.layer[0]} of "
                f"{jnp.shape(leaves[path])}."
            )


def gathered(pairs: Iterable[Pair], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns leaves by path of the arrays by name that `Pair.into` made: layers in one."""
    whole: dict[str, np.ndarray] = {}
    layers: dict[str, list[tuple[int, int, np.ndarray]]] = {}
    for pair in pairs:
        if pair.layer is None:
            whole[pair.path] = arrays[pair.name]
        else:
            layers.setdefault(pair.path, []).append(
                (pair.layer[1], pair.layer[0], arrays[pair.name])
            )
    for path, its in layers.items():
        its.sort(key=lambda row: row[0])
        whole[path] = np.stack([x for _, _, x in its], axis=its[0][1])
    return whole


def expect_all_parts(
    parts: Sequence[str], pairs: Mapping[str, Pair], name: str, caller: str
) -> bool:
    """Returns whether a parameter has leaves; refuses one of which some parts have none."""
    lacks = [part for part in parts if part not in pairs]
    if lacks and len(lacks) < len(parts):
        raise ValueError(
            f"{caller}: found no leaf for {some(lacks)}, a part of {name}; expected one for each "
            "part, to join them."
        )
    return not lacks


def sizes_by_name(
    leaves: Mapping[str, Any], rules: Rules, parts: Callable[[str], Sequence[str]], caller: str
) -> Callable[[str], int | None]:
    """Returns a function from a name to how many elements its leaf has; `None` without a leaf."""

    def one(name: str) -> int | None:
        path, layer, _ = _place_of(name, leaves, rules, caller)
        if path is None:
            return None
        shape = jnp.shape(leaves[path])
        return math.prod(shape) // (max(shape[layer[0]], 1) if isinstance(layer, tuple) else 1)

    def size(name: str) -> int | None:
        sizes = [one(part) for part in parts(name)]
        return None if None in sizes else sum(size for size in sizes if size)

    return size


def open_ways(pairs: Iterable[Pair], leaves: Mapping[str, Any]) -> dict[str, Way]:
    """Returns the ways of the leaves whose layout shapes do not tell, by path."""
    return {
        pair.path: pair.way
        for pair in pairs
        if is_open(pair.path, pair.shape_in(leaves[pair.path]), pair.way)
    }


def expect_real(leaves: Mapping[str, Any], kinds: Iterable[str], caller: str) -> None:
    """Refuses complex leaves that have a ν, of which PyTorch has two and ours one."""
    kinds = [kind for kind in kinds if kind not in ("mu", "trace")]
    complex_leaves = [
        path for path, leaf in leaves.items() if jnp.issubdtype(dtype_of(leaf), jnp.complexfloating)
    ]
    if kinds and complex_leaves:
        raise ValueError(
            f"{caller}: found complex leaves at {some(complex_leaves)}; expected real ones, "
            "because PyTorch gives each part of a complex number its own ν, and ours one to both. "
            "Let the leaves be real, of shape (…, 2), and say transpose={name: as_real()}."
        )
