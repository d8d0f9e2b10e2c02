"""What errors have in common.

How they show a value, and the checks that many functions make of their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from adam_jax._core.leaves import PyTree, dtype_of


def brief(value: Any) -> str:
    """Returns how an error shows a value that was not expected.

    In short, and never with the elements of an array.
    """
    if _is_array(value):
        return f"an array of {value.dtype} and shape {value.shape}" if value.shape else repr(value)
    if any(map(_is_array, jax.tree.leaves(value))):
        return f"a value of type {type(value).__name__} that holds arrays"
    text = getattr(value, "__qualname__", None) or repr(value)
    return text if len(text) <= 200 else f"a value of type {type(value).__name__}"


def _is_array(value: Any) -> bool:
    return isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "dtype")


def expect_array(leaf: Any, caller: str) -> None:
    """Refuses what is neither an array nor its shape, before JAX does in its own words.

    Raises:
      TypeError: for a function in a module, a string, a tensor of PyTorch.
    """
    try:
        dtype_of(leaf)
    except TypeError as error:
        hint = "Of an Equinox module pass eqx.filter(model, eqx.is_array)."
        said = (
            str(error)
            if "PyTorch" in str(error)
            else f"found {brief(leaf)}; expected an array or its shape. {hint}"
        )
        raise TypeError(f"{caller}: {said}") from error


def expect_params(params: PyTree | None, caller: str) -> PyTree:
    """`params`, if they are there."""
    if params is None:
        raise ValueError(
            f"{caller} needs the parameters, and `update` was called without: call update(grads, "
            "state, params)."
        )
    return params


def expect_one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Refuses an option that is none of the known ones."""
    if not any(value is option or (isinstance(value, str) and value == option) for option in known):
        raise ValueError(
            f"{name}: found {brief(value)}; expected one of {', '.join(map(repr, known))}."
        )


def expect_integer(name: str, value: Any, least: int | None = None) -> None:
    """Refuses what is no Python or NumPy integer, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: found {brief(value)}; expected an integer.")
    if least is not None and value < least:
        raise ValueError(f"{name}: found {value}; expected {least} or more.")


def some(names: Sequence[str], most: int = 4) -> str:
    """Returns the first names of many, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
