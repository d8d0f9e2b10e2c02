"""The names of PyTorch, the paths that they mean, and the numbers behind them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from adam_jax._core.errors import brief

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
