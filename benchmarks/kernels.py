"""How many kernels a step runs and how many arrays a state has, beside Optax.

`python -m benchmarks.kernels`.

A kernel is a fusion, a copy or a call in any computation that is not the body of a fusion. On a GPU
each is a launch, which is most of the time of a small model's step.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adam_jax
from benchmarks._table import Table, show

PARAMS = {"body": (6, 4), "head": (4, 3)}

PAIRS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "adam": (adam_jax.adam, optax.adam),
    "adamw": (adam_jax.adamw, optax.adamw),
    "momentum": (
        functools.partial(adam_jax.momentum, momentum=0.9),
        functools.partial(optax.sgd, momentum=0.9),
    ),
    "rmsprop": (adam_jax.rmsprop, optax.rmsprop),
    "nadam": (adam_jax.nadam, optax.nadam),
    "lamb": (adam_jax.lamb, optax.lamb),
}
"""Ours and Optax's, from a learning rate."""

RATES = {"constant": 0.1, "schedule": optax.linear_schedule(1.0, 0.0, 10)}


def count_kernels(tx: optax.GradientTransformation) -> int:
    """Counts what a donated step of update and apply runs on two small leaves."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = abstract_params()
    donated = jax.jit(step, donate_argnums=(0, 1))
    lowered = donated.lower(params, jax.eval_shape(tx.init, params), params)
    text = lowered.compile({"xla_llvm_disable_expensive_passes": True}).as_text()
    bodies = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text))
    count, name = 0, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[1]
        elif name not in bodies:
            count += bool(re.search(r" (?:fusion|copy|call|custom-call|while|conditional)\(", line))
    return count


def count_arrays(tx: optax.GradientTransformation) -> int:
    """Counts the arrays of a state."""
    return len(jax.tree.leaves(jax.eval_shape(tx.init, abstract_params())))


def abstract_params() -> Any:
    """Returns the shapes of the two leaves."""
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in PARAMS.items()}


def kernel_table() -> Table:
    """Returns the counts of all optimizers, with a constant learning rate and with a schedule."""
    rows = []
    for name, (ours, theirs) in PAIRS.items():
        for rate, value in RATES.items():
            pair = ours(value), theirs(value)
            kernels, arrays = map(count_kernels, pair), map(count_arrays, pair)
            rows.append((name, rate, *map(str, kernels), *map(str, arrays)))
    heads = ("optimizer", "rate", "kernels", "Optax's", "state arrays", "Optax's")
    note = "Of one donated step of update and apply on two leaves. lamb's norms are exact."
    return Table("Kernels and state arrays", heads, rows, note)


def main(arguments: Sequence[str] | None = None) -> None:
    """Counts and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--output", type=Path, help="a markdown file to write the table to")
    show([kernel_table()], parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
