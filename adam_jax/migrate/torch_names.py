"""Which parameter of PyTorch is which leaf, and how its axes lie there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from adam_jax._core.errors import brief, some
from adam_jax._core.leaves import dtype_of
from adam_jax.migrate.torch_layout import (
    Layouts,
    Way,
    expect_patterns,
    is_open,
    unused_of,
    way_of,
    word_that_fits,
)

Names: TypeAlias = Mapping[str, str | None] | Callable[[str], str | None]

ALIASES = {
    "weight": ("kernel", "scale", "embedding"),
    "running_mean": ("mean",),
    "running_var": ("var",),
}
"""What the last part of a PyTorch name can be in a tree of parameters."""


TAKE_THEM = (
    "name_of = {id(p): n for n, p in model.named_parameters()}; "
    "names = [[name_of[id(p)] for p in group['params']] for group in optimizer.param_groups]"
)
"""The lines that give the names in the optimizer's order, whatever its groups are."""


WRAPPERS = re.compile(r"((module|_orig_mod|_forward_module|_fsdp_wrapped_module)\.)+")
"""What DataParallel, torch.compile, DeepSpeed and FSDP put in front of names."""


class Pair(NamedTuple):
    """A parameter of PyTorch and a leaf of ours.

    Attributes:
      name: PyTorch's.
      path: ours.
      way: how its axes go there and back.
    """

    name: str
    path: str
    way: Way

    def into(self, tensor: Any, leaf: Any, caller: str) -> np.ndarray:
        """PyTorch's array as ours lies."""
        x = number_array(tensor, self.name, caller)
        try:
            y = self.way.there(x)
        except ValueError:
            y = None
        if y is None or y.shape != jnp.shape(leaf):
            made = "which cannot be transposed so" if y is None else f"transposed {y.shape}"
            word = word_that_fits(x.shape, jnp.shape(leaf))
            raise ValueError(
                f"{caller}: {self.name}: found the shape {x.shape}, {made}; expected "
                f"{jnp.shape(leaf)}, of {self.path}. If the two are the same parameter, say how it "
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


def _of_order(caller: str) -> str:
    """What else a shape can mean that differs, where names come in an order."""
    if caller not in ("from_torch", "to_torch"):
        return ""
    return f" If not, the order of names= is not the optimizer's: {TAKE_THEM}."


def number_array(x: Any, name: str, caller: str) -> np.ndarray:
    """A tensor or an array as one of NumPy."""
    if "sparse" in str(getattr(x, "layout", "")):
        raise ValueError(
            f"{caller}: {name}: found a sparse tensor; expected a dense one: x.to_dense()."
        )
    if hasattr(x, "detach"):
        try:
            x = x.detach().cpu().resolve_neg().resolve_conj()
            return np.asarray(
                (x.float() if "bfloat16" in str(x.dtype) else x).numpy()
            )  # NumPy does not have bfloat16
        except (TypeError, RuntimeError) as error:
            raise TypeError(
                f"{caller}: {name}: found a tensor that is no array, {error}; expected a dense one "
                "in memory."
            ) from error
    found = np.asarray(x) if hasattr(x, "__array__") or isinstance(x, (int, float)) else None
    if found is None or not (
        found.dtype.kind in "biufc" or jnp.issubdtype(found.dtype, jnp.floating)
    ):
        said = x if found is None else f"an array of {found.dtype}"
        raise TypeError(
            f"{caller}: {name}: found {said!r} of type {type(x).__name__}; expected a tensor or an "
            "array of numbers."
        )
    return found


def expect_table(state_dict: Any, caller: str) -> None:
    """Refuses what is no state dict."""
    if isinstance(state_dict, tuple) and len(state_dict) == 2:
        raise TypeError(
            f"{caller}: found a tuple, such as get_state_dict returns; expected its first part for "
            "weights, or its second one for the optimizer."
        )
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{caller}: found a {type(state_dict).__name__}; expected a state dict. Load a file "
            "yourself, with torch.load(path, weights_only=True) or safetensors, and give what it "
            "holds."
        )


def pairs_of(
    names: Iterable[str],
    leaves: Mapping[str, Any],
    mapping: Names | None,
    transpose: Layouts | None,
    caller: str,
    still: Set[str] = frozenset(),
    tied: bool = False,
) -> dict[str, Pair]:
    """Parameters of PyTorch with their leaves, by name, but for those that are left out.

    The leaves in `still` may have no name, and where they may be `tied` several.
    """
    found: dict[str, Pair] = {}
    taken: dict[str, str] = {}
    _expect_rules(mapping, transpose, caller)
    names, lost = list(names), []
    for name in names:
        target = target_of(name, mapping, caller)
        path = target and next((path for path in options_of(target) if path in leaves), None)
        if path is None:
            lost += [name] if target and not name.endswith("num_batches_tracked") else []
            continue
        if path in taken and not tied:
            raise ValueError(
                f"{caller}: found that {taken[path]!r} and {name!r} are both mapped to {path}; "
                "expected one for each leaf."
            )
        taken[path] = name
        both = (name, cut_name(name, mapping))
        way = way_of(both, path, jnp.ndim(leaves[path]), transpose, caller)
        found[name] = Pair(name, path, way)
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
    unknown = [
        name
        for name in unused_of(transpose, [*names, *(cut_name(name, mapping) for name in names)])
        if not {*options_of(target_of(name, mapping, caller) or "")} & still
    ]
    if unknown:
        raise ValueError(
            f"{caller}: found {some(unknown)} in transpose, which is no name of PyTorch's here; "
            f"expected names such as {some(names)}."
        )
    return found


def _expect_rules(mapping: Any, transpose: Any, caller: str) -> None:
    """Refuses what is neither a table of names nor a function."""
    for what, rule in [("mapping", mapping), ("transpose", transpose)]:
        table = isinstance(rule, Mapping) and all(isinstance(name, str) for name in rule)
        if rule is not None and not table and not callable(rule):
            raise TypeError(
                f"{caller}: {what}: found {brief(rule)}; expected a table by PyTorch's names, or a "
                "function."
            )
    expect_patterns(transpose, "transpose", caller)


def target_of(name: str, mapping: Names | None, caller: str) -> str | None:
    """Where a name leads: the longest beginning that is in a table is replaced.

    One that the table maps to "" is cut off, and the rest is looked up in turn.
    """
    if callable(mapping):
        start, new = name, mapping(name)
    else:
        table, name = mapping or {}, cut_name(name, mapping)
        start = _start_of(name, table)
        new = table[start] if start else ""
    if not isinstance(new, (str, type(None))):
        raise TypeError(
            f"{caller}: mapping: found {brief(new)} for {start!r}; expected a path in the "
            "parameters, or None."
        )
    return None if new is None else new + name[len(start) :]


def cut_name(name: str, mapping: Names | None) -> str:
    """Returns a name without the beginnings that a table maps to ""."""
    table = mapping if isinstance(mapping, Mapping) else {}
    while (start := _start_of(name, table)) and table[start] == "" and start != name:
        name = name[len(start) :].lstrip(".")
    return name


def _start_of(name: str, table: Mapping[str, Any]) -> str:
    """The longest beginning of a name that is in a table, up to a dot or with it; "" if none."""
    ends = (i for i in range(len(name), 0, -1) if "." in name[i - 1 : i + 1] or i == len(name))
    return next((name[:i] for i in ends if name[:i] in table), "")


def options_of(target: str) -> list[str]:
    """The paths that a name can mean."""
    head, slash, last = target.replace(".", "/").rpartition("/")
    return [head + slash + its for its in (last, *ALIASES.get(last, ()))]


def sizes_by_name(
    leaves: Mapping[str, Any], mapping: Names | None, caller: str
) -> Callable[[str], int | None]:
    """Returns a function from a name to how many elements its leaf has; `None` without a leaf."""

    def size(name: str) -> int | None:
        options = options_of(target_of(name, mapping, caller) or "")
        return next(
            (math.prod(jnp.shape(leaves[path])) for path in options if path in leaves), None
        )

    return size


def open_ways(pairs: Iterable[Pair], leaves: Mapping[str, Any]) -> dict[str, Way]:
    """Returns the ways of the leaves whose layout shapes do not tell, by path."""
    return {
        pair.path: pair.way
        for pair in pairs
        if is_open(pair.path, jnp.shape(leaves[pair.path]), pair.way)
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
