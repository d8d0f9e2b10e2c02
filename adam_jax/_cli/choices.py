"""What the command line chooses among by name, and the optimizer that a choice makes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

import adam_jax
from adam_jax.storage.formats import NAMED


def sgd(learning_rate: Any, storage: Any = None) -> adam_jax.extend.Transformation:
    """Plain stochastic gradient descent: the learning rate and nothing else."""
    del storage  # it has no moments
    return adam_jax.chain(adam_jax.scale_by_learning_rate(learning_rate))


OPTIMIZERS: dict[str, Callable[..., Any]] = {"sgd": sgd} | {
    name: getattr(adam_jax, name) for name in adam_jax.family.__all__
}


PRECISIONS: dict[str, tuple[Any, tuple[adam_jax.extend.Transformation, ...]]] = {
    "float32": (jnp.float32, ()),
    "bfloat16": (jnp.bfloat16, ()),
    "bfloat16-stochastic": (jnp.bfloat16, (adam_jax.round_stochastically(),)),
    "bfloat16-compensated": (jnp.bfloat16, (adam_jax.compensate(),)),
}
"""The parameters' dtype, and the link by which they receive an update that is smaller than their
last bit."""


def unknown(what: str, found: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not known, with the one that was probably meant."""
    known = list(known)
    near = difflib.get_close_matches(found.lower().replace("-", "_"), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return ValueError(f"{what}: found {found!r}; {hint}known are {', '.join(known)}")


def optimizer(option: str, name: str) -> str:
    """The name, if it is one.

    Raises:
      ValueError: if it is not.
    """
    if name not in OPTIMIZERS:
        raise unknown(option, name, OPTIMIZERS)
    return name


def optimizers(option: str, names: str) -> list[str]:
    """The names in a list separated by commas, each once.

    Raises:
      ValueError: if there is none, or one is not known.
    """
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen:
        raise ValueError(f"{option}: found no name; --list shows them all")
    return [optimizer(option, name) for name in chosen]


def storage(said: str) -> Any:
    """How moments rest: "8bit", or "bfloat16,8bit" for μ and ν.

    Raises:
      ValueError: if it is neither.
    """
    names = tuple(name.strip() for name in said.split(","))
    if len(names) > 2 or not set(names) <= set(NAMED):
        raise ValueError(
            f"--storage: found {said!r}; expected {', '.join(NAMED)}, or two of them with a comma, "
            "for mu and nu"
        )
    return names[0] if len(names) == 1 else names


def factory(
    name: str, storage: Any, precision: str, observed: bool = False
) -> Callable[[Any], adam_jax.extend.Transformation]:
    """Returns a function from a learning rate to the optimizer of that name.

    The optimizer stores, rounds and observes as the command line was told.
    """
    links = PRECISIONS[precision][1]

    def make(rate: Any) -> Any:
        alone = OPTIMIZERS[name](rate, storage=storage)
        whole = adam_jax.chain(alone, *links) if links else alone
        return adam_jax.observe(whole) if observed else whole

    return make


def listing() -> list[tuple[str, str]]:
    """Every optimizer, and the first line of its docstring."""
    return [
        (name, (inspect.getdoc(make) or "").partition("\n")[0]) for name, make in OPTIMIZERS.items()
    ]
