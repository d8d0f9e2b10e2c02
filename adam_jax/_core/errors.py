"""What errors have in common.

How they show a value, and the checks that many functions make of their arguments.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
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


def expect_parameters(params: PyTree, caller: str) -> None:
    """Refuses what holds a whole run, which has floats of its own: its moments would be trained."""
    if hasattr(params, "opt_state"):
        raise TypeError(
            f"{caller}: params: found {type(params).__name__}, which holds a state beside the "
            "parameters; expected the parameters alone, such as its .params, or the nnx.Param of "
            "the model: nnx.state(model, nnx.Param)."
        )


def call_user(name: str, function: Callable[[Any], Any], argument: Any, what: str) -> Any:
    """Returns what a function of the user's says.

    Args:
      name: the argument that the function was given for.
      function: the function.
      argument: what it is called with.
      what: what that is, in words.

    Raises:
      TypeError: if it cannot be called with one argument; what it raises itself passes.
    """
    try:
        return function(argument)
    except TypeError as error:
        try:
            inspect.signature(function).bind(argument)
        except TypeError:
            raise TypeError(
                f"{name}: found {brief(function)}, which cannot be called with one argument "
                f"({error}); expected a function of {what} alone."
            ) from error
        except ValueError:
            pass  # a function without a signature
        raise


def expect_one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Refuses an option that is none of the known ones."""
    if not any(value is option or (isinstance(value, str) and value == option) for option in known):
        raise ValueError(
            f"{name}: found {brief(value)}; expected one of {', '.join(map(repr, known))}."
        )


def expect_flag(name: str, value: Any) -> None:
    """Refuses what is neither `True` nor `False`."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: found {brief(value)}; expected True or False.")


def expect_integer(name: str, value: Any, least: int | None = None) -> None:
    """Refuses what is no Python or NumPy integer, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: found {brief(value)}; expected an integer.")
    if least is not None and value < least:
        raise ValueError(f"{name}: found {value}; expected {least} or more.")


SPELLINGS = (
    ("learning_rate", "lr", "alpha", "step_size"),
    ("b1", "beta1", "beta_1", "betas"),
    ("b2", "beta2", "beta_2", "betas"),
    ("eps", "epsilon"),
    ("weight_decay", "wd", "weight_decay_rate"),
)
"""How libraries call one argument."""


WITH_DECAY = {"adam": "adamw", "nadam": "nadamw", "adamax": "adamaxw"}
"""The optimizers that have weight decay, by those that have none."""


def meant(caller: str, name: str, known: Sequence[str]) -> str | None:
    """Returns what was probably meant by an unknown argument, if something was.

    Args:
      caller: the function that does not have it.
      name: the unknown name.
      known: the arguments that the function has.
    """
    if name == "weight_decay" and caller in WITH_DECAY and name not in known:
        return f"{WITH_DECAY[caller]}(..., weight_decay=...)"
    if name == "betas" and {"b1", "b2"} <= {*known}:
        return "b1 and b2"
    same: set[str] = {other for names in SPELLINGS if name in names for other in names}
    near = near_argument(name, known)
    return next((other for other in known if other in same), near)


def near_argument(name: str, known: Sequence[str], alike: float = 0.6) -> str | None:
    """Returns the known name that is spelt most alike, if one is; 1.0 is the same name."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=alike)), None)


def bound_arguments(function: Callable[..., Any], args: Any, kwargs: Any) -> inspect.BoundArguments:
    """Returns the arguments of a call by name.

    Raises:
      TypeError: for an argument that the function does not have, with the one that was probably
        meant, and for a call that lacks one.
    """
    signature, caller = inspect.signature(function), function.__name__
    known = list(signature.parameters)
    for name in kwargs:
        if name not in known:
            near = meant(caller, name, known)
            hint = f" Did you mean {near}?" if near else ""
            raise TypeError(
                f"{caller}: found the argument {name!r}; expected only {', '.join(known)}.{hint}"
            )
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{caller}: {error}; expected {', '.join(known)}.") from error


def hint_for(value: Any) -> str:
    """Returns what an error adds where something stands in the place of a transformation."""
    if isinstance(value, (list, tuple)) and value and all(hasattr(v, "update") for v in value):
        return f" (did you mean chain(*transformations), not a {type(value).__name__} of them?)"
    if hasattr(value, "gradient_transformation"):
        return " (did you mean its .gradient_transformation()?)"
    return " (a function: did you mean to call it?)" if callable(value) else ""


def some(names: Sequence[str], most: int = 4) -> str:
    """Returns the first names of many, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
