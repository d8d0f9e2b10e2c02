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
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import adam_jax
from benchmarks._table import NOT_INSTALLED, Table, installed, show

B1 = 0.9
EPS = 1e-8
B2S = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
STEPS = (1, 2, 10, 100, 1000, 10000)


class Task(NamedTuple):
    """What every contender is given.

    Attributes:
      gradients: one row a step, float32, and exact in `dtype`.
      b2: β₂, or one for every step.
      steps: at which steps to look, ascending, from 1.
      dtype: of the parameters and of the gradients.
    """

    gradients: np.ndarray
    b2: float | tuple[float, ...]
    steps: tuple[int, ...]
    dtype: str = "float32"

    def b2_at(self, step: int) -> float:
        """β₂ of the step with this number."""
        return self.b2[step - 1] if isinstance(self.b2, tuple) else self.b2


class Seen(NamedTuple):
    """What a contender shows at a step: its update at learning rate 1, and its ν as it rests."""

    update: np.ndarray
    nu: np.ndarray


Contender: TypeAlias = Callable[[Task], Iterator[Seen]]


# The contenders.


def exact(
    task: Task, rest: Callable[[np.ndarray], np.ndarray] = lambda moment: moment
) -> Iterator[Seen]:
    """Algorithm 1 in long double.

    Args:
      task: see `Task`.
      rest: what becomes of a moment between two steps.
    """
    long = np.longdouble
    mu = nu = np.zeros(task.gradients.shape[1], long)
    b1, eps, one = long(str(B1)), long(str(EPS)), long(1)
    b1_power = b2_power = one
    for step, gradient in enumerate(task.gradients[: task.steps[-1]].astype(np.float32), 1):
        b2, g = long(str(task.b2_at(step))), gradient.astype(long)
        mu = rest(b1 * mu + (one - b1) * g)
        nu = rest(b2 * nu + (one - b2) * g * g)
        b1_power, b2_power = b1_power * b1, b2_power * b2
        if step in task.steps:
            yield Seen(mu / (one - b1_power) / (np.sqrt(nu / (one - b2_power)) + eps), nu)


def floor(task: Task) -> Iterator[Seen]:
    """The same, but for moments rounded to float32 between two steps.

    What that alone costs, however exact the rest.
    """
    return exact(task, lambda moment: moment.astype(np.float32).astype(np.longdouble))


def ours(task: Task) -> Iterator[Seen]:
    """`adam_jax.adam`, jitted."""
    return _in_jax(task, adam_jax.adam(1.0, B1, _number_or_schedule(task), EPS))


def by_optax(task: Task) -> Iterator[Seen]:
    """`optax.adam`, jitted; in `optax.inject_hyperparams` for a schedule.

    Which it does not take otherwise.
    """
    make = optax.inject_hyperparams(optax.adam) if isinstance(task.b2, tuple) else optax.adam
    return _in_jax(task, make(1.0, B1, _number_or_schedule(task), EPS))


def by_torch(task: Task) -> Iterator[Seen]:
    """`torch.optim.Adam` as it is by default.

    For a schedule, the betas of its parameter group are set before each step.
    """
    import torch

    torch.set_num_threads(
        1
        # So few elements gain nothing from a second one, and wait for it on a busy machine.
    )
    parameter = torch.nn.Parameter(
        torch.zeros(task.gradients.shape[1], dtype=getattr(torch, task.dtype))
    )
    optimizer = torch.optim.Adam([parameter], lr=1.0, eps=EPS)
    for step, gradient in enumerate(torch.from_numpy(task.gradients[: task.steps[-1]]), 1):
        optimizer.param_groups[0]["betas"] = (B1, task.b2_at(step))
        parameter.grad = gradient.to(parameter.dtype)
        # So that the sum of parameter and update rounds nothing off the update
        parameter.data.zero_()
        optimizer.step()
        if step in task.steps:
            nu = optimizer.state[parameter]["exp_avg_sq"]
            yield Seen(-parameter.detach().double().numpy(), nu.double().numpy())


def _in_jax(task: Task, optimizer: optax.GradientTransformation) -> Iterator[Seen]:
    params = jnp.zeros(task.gradients.shape[1], task.dtype)
    gradients = jnp.asarray(task.gradients, task.dtype)

    @jax.jit
    def advance(state: Any, gradients: Array, done: int, until: int) -> Any:
        return lax.fori_loop(
            done,
            until,
            lambda i, carry: optimizer.update(gradients[i], carry[1], params),
            (params, state),
        )

    state, done = optimizer.init(params), 0
    for step in task.steps:
        update, state = advance(state, gradients, done, step)
        done = step
        yield Seen(
            -np.asarray(update, np.float64), np.asarray(optax.tree.get(state, "nu"), np.float64)
        )


def _number_or_schedule(task: Task) -> Any:
    if not isinstance(task.b2, tuple):
        return task.b2
    values = np.asarray(task.b2, np.float32)
    return lambda count: jnp.asarray(values)[count]


CONTENDERS: dict[str, Contender | None] = {
    "ours": ours,
    "floor": floor,
    "Optax": by_optax,
    "PyTorch": by_torch if installed("torch") else None,
}
"""In the order of the columns; `None` for what is not installed."""


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


if __name__ == "__main__":
    main()
