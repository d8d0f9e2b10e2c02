"""`traced_once`: mathematics of a leaf that many leaves of one shape share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


def traced_once(*static: str, inline: bool = False) -> Callable[[Function], Function]:
    """Returns a decorator that traces a function once for each shape, and not for each leaf.

    It is `jax.jit`, with the types of what it decorates. Inside another jit it is a call, which XLA
    inlines, so nothing changes but the time to trace and to lower. Outside it is one kernel in
    place of many.

    Args:
      *static: names of arguments that are no arrays.
      inline: whether JAX inlines the call already, which costs some of the time saved.
    """

    def decorate(function: Function) -> Function:
        return jax.jit(function, static_argnames=static, inline=inline)  # type: ignore[return-value]

    return decorate
