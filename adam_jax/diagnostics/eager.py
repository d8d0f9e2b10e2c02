"""A function of a step that compiles once, where the step itself is not compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from adam_jax._core.context import Context

_NUMBER = object()
"""Stands where a number or an array was, among what is a part of the program."""


def is_traced(*trees: Any) -> bool:
    """Whether one of the arrays is traced."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of a step that compiles once for arrays of equal shapes.

    What is neither an array nor a number in the extra arguments of `update`, a function for
    example, is a part of the program.

    Args:
      function: (updates, state, params, context) -> arrays. It sees no probe and no selector.
    """

    @functools.partial(jax.jit, static_argnames=("structure", "rest", "facts"))
    def run(numbers: list[Any], structure: Any, rest: tuple[Any, ...], facts: Any) -> Any:
        values = iter(numbers)
        leaves = [next(values) if x is _NUMBER else x for x in rest]
        updates, state, params, rate, varying = jax.tree.unflatten(structure, leaves)
        applied, inside, wide, rounded, earlier = facts
        context = Context(
            applied=applied,
            inside=inside,
            wide=wide,
            rounded=rounded,
            earlier=dict(earlier),
            learning_rate=None if rate is None else lambda: rate,
            **varying,
        )
        return function(updates, state, params, context)

    def call(updates: Any, state: Any, params: Any, context: Context) -> Any:
        rate = None if context.learning_rate is None else context.learning_rate()
        varying = {
            "gradient": context.gradient,
            "incoming": context.incoming,
            "extra": dict(context.extra),
        }
        leaves, structure = jax.tree.flatten((updates, state, params, rate, varying))
        earlier = tuple(sorted(context.earlier.items()))
        return run(
            [x for x in leaves if _is_number(x)],
            structure,
            tuple(_NUMBER if _is_number(x) else x for x in leaves),
            (context.applied, context.inside, context.wide, context.rounded, earlier),
        )

    return call


def _is_number(x: Any) -> bool:
    numbers = (jax.Array, np.ndarray, np.generic, int, float, complex)
    return isinstance(x, numbers) and not isinstance(x, bool)
