"""How far each Adam's update is from the exact one: `python -m benchmarks.accuracy`.

The exact one is Algorithm 1 of Kingma & Ba (2015) in long double, with the decimal β's that the
user wrote. Every contender gets the same gradients, and is asked for the update at learning rate 1:
what it subtracts from the parameters.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks._table import NOT_INSTALLED, Table, show
from benchmarks._updates import CONTENDERS, Contender, Task, exact

B2S = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)


STEPS = (1, 2, 10, 100, 1000, 10000)


# The measurements.


class Error(NamedTuple):
    """Relative error of an update, over the parameters."""

    median: float
    percentile_99: float


class ErrorRow(NamedTuple):
    """The errors at one step.

    Attributes:
      b2: β₂.
      step: from 1.
      errors: by contender; `None` where it is not installed.
    """

    b2: float
    step: int
    errors: dict[str, Error | None]


def update_errors(
    b2s: Sequence[float] = B2S, steps: Sequence[int] = STEPS, parameters: int = 4096, seed: int = 0
) -> Iterator[ErrorRow]:
    """Errors of the update under standard normal gradients, in float32.

    One row for each β₂ and step.
    """
    steps = tuple(sorted(steps))
    gradients = np.random.default_rng(seed).standard_normal((steps[-1], parameters), np.float32)
    for b2 in b2s:
        task = Task(gradients, b2, steps)
        truth = exact(task)
        running = {
            name: contender(task) if contender else None for name, contender in CONTENDERS.items()
        }
        for step in steps:
            right = next(truth).update
            errors = {
                name: _error(next(run).update, right) if run else None
                for name, run in running.items()
            }
            yield ErrorRow(b2, step, errors)


def _error(update: np.ndarray, right: np.ndarray) -> Error:
    relative = np.abs(update.astype(right.dtype) / right - 1).astype(np.float64)
    return Error(float(np.median(relative)), float(np.quantile(relative, 0.99)))


def scheduled_extremes(
    before: float = 0.9, after: float = 0.999, change: int = 100, steps: int = 300
) -> dict[str, Any]:
    """Returns the smallest and the largest |update| under a constant gradient of 1.

    β₂ changes after `change` steps.

    Returns:
      (smallest, largest) by contender, "exact" among them; `None` where it is not installed.
    """
    b2 = (before,) * change + (after,) * (steps - change)
    task = Task(np.ones((steps, 1), np.float32), b2, tuple(range(1, steps + 1)))

    def extremes(contender: Contender) -> tuple[float, float]:
        lengths = [float(np.abs(seen.update[0])) for seen in contender(task)]
        return min(lengths), max(lengths)

    return _each(extremes)


def bfloat16_nu(
    spike: float = 100.0, usual: float = 0.01, steps: int = 10_000, b2: float = 0.999
) -> dict[str, Any]:
    """ν of bfloat16 parameters after one large gradient and `steps` usual ones.

    Returns:
      ν by contender, "exact" among them; `None` where it is not installed.
    """
    gradients = np.full((1 + steps, 1), usual, np.float32)
    gradients[0] = spike
    representable = gradients.astype(jnp.bfloat16).astype(np.float32)
    task = Task(representable, b2, (1 + steps,), "bfloat16")
    return _each(lambda contender: float(next(contender(task)).nu[0]))


def _each(measure: Callable[[Contender], Any]) -> dict[str, Any]:
    return {
        name: measure(contender) if contender else None
        for name, contender in {"exact": exact, **CONTENDERS}.items()
    }


# The tables.


def error_table(rows: Sequence[ErrorRow]) -> Table:
    """`update_errors` as a table."""
    cell = partial(_cell, show=lambda error: f"{error.median:.1e} / {error.percentile_99:.1e}")
    bits = np.finfo(np.longdouble).nmant + 1
    return Table(
        "Relative error of the update: median / 99th percentile over the parameters",
        ("β₂", "t", *CONTENDERS),
        [(str(row.b2), str(row.step), *map(cell, row.errors.values())) for row in rows],
        f"Against Algorithm 1 of Kingma & Ba in long double (here {bits} bits), β's as decimals; "
        "float32, standard normal gradients. The floor is that same long double algorithm with μ "
        "and ν rounded to float32 after each step, which is what a float32 state costs by itself.",
    )


def scheduled_table(extremes: dict[str, Any]) -> Table:
    """`scheduled_extremes` as a table."""
    cell = partial(_cell, show=lambda pair: f"{pair[0]:.7f} … {pair[1]:.7f}")
    return Table(
        "Smallest … largest |update| over 300 steps of gradient 1, β₂ = 0.9 for 100 steps, then "
        "0.999",
        tuple(extremes),
        [tuple(map(cell, extremes.values()))],
        "Any average of ones is 1, so each step should be 1. The floor is that of the first "
        "table: just below 1 a float32 ν takes no step smaller than 3e-8, and its last ones would "
        "be smaller.",
    )


def bfloat16_table(nus: dict[str, Any]) -> Table:
    """`bfloat16_nu` as a table."""
    return Table(
        "ν of bfloat16 parameters after one gradient of 100 and 10,000 of 0.01, β₂ = 0.999",
        tuple(nus),
        [tuple(_cell(nu, lambda value: f"{value:.3g}") for nu in nus.values())],
        "Exact for the bfloat16 neighbour of 0.01, which all of them get.",
    )


def _cell(value: Any, show: Callable[[Any], str]) -> str:
    return NOT_INSTALLED if value is None else show(value)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--b2", type=float, nargs="+", default=B2S, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=STEPS, help="at which to look; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="a markdown file to write the tables to")
    options = parser.parse_args()
    rows = list(update_errors(options.b2, options.steps))
    show(
        [error_table(rows), scheduled_table(scheduled_extremes()), bfloat16_table(bfloat16_nu())],
        options.output,
    )
