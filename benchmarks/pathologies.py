"""Four runs that go wrong, each beside a healthy one of the same network.

`python -m benchmarks.pathologies`.

An MLP of 64-32-32-10 on the digits of scikit-learn, every step observed, in a few seconds.
`tests/diagnostics/test_pathologies.py` holds what the table shows.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import adam_jax
from benchmarks._table import Table, show

STEPS, BATCH, SHIFT = 600, 64, 400
DEAD = "hidden/.*"


def _adam(rate: Any, b2: Any, eps: Any) -> Any:
    return adam_jax.adam(rate, b2=b2, eps=eps)


def _rounded(*numbers: Any) -> Any:
    return adam_jax.chain(_adam(*numbers), adam_jax.round_stochastically())


def _grouped(*numbers: Any) -> Any:
    return adam_jax.by_path({DEAD: {}}, _adam(*numbers))


class Case(NamedTuple):
    """A run.

    Attributes:
      rate: the learning rate.
      b2: Adam's β₂.
      eps: Adam's ε.
      build: from these numbers to the optimizer of all parameters.
      dtype: that of the parameters.
      bias: where those of the layer in the middle start.
      shifts: whether images are black up to step `SHIFT`.
    """

    rate: float
    b2: float = 0.999
    eps: float = 1e-8
    build: Callable[..., Any] = _adam
    dtype: Any = np.float32
    bias: float = 0.0
    shifts: bool = False


class Pathology(NamedTuple):
    """What goes wrong, and how it is found.

    Attributes:
      metric: the name of what shows it.
      limit: between its healthy values and the others.
      sick_is_above: on which side it is sick.
      steps: over which the median is taken.
      sick: the run that goes wrong.
      healthy: the same without it.
    """

    metric: str
    limit: float
    sick_is_above: bool
    steps: slice
    sick: Case
    healthy: Case


class Outcome(NamedTuple):
    """What came of a run.

    Attributes:
      losses: of each step's batch, (steps,).
      seen: each metric, (steps,).
    """

    losses: np.ndarray
    seen: dict[str, np.ndarray]


ROUNDED = Case(1e-4, build=_rounded, dtype=jnp.bfloat16)
"""What mends the third."""

PATHOLOGIES = {
    "β₂ too large for data that shift": Pathology(
        "all/normalized_gradient_rms",
        3.0,
        True,
        slice(SHIFT, SHIFT + 5),
        Case(6e-2, b2=0.9999, shifts=True),
        Case(6e-2, b2=0.95, shifts=True),
    ),
    "ε too large": Pathology(
        "all/eps_fraction", 0.5, True, slice(0, STEPS), Case(1e-3, eps=1.0), Case(1e-3)
    ),
    "bf16, rounded to nearest": Pathology(
        "all/stalled_fraction",
        0.5,
        True,
        slice(0, STEPS),
        Case(1e-4, dtype=jnp.bfloat16),
        Case(1e-4),
    ),
    "a dead layer": Pathology(
        f"{DEAD}/gradient_norm",
        1e-6,
        False,
        slice(0, STEPS),
        Case(1e-3, build=_grouped, bias=-100.0),
        Case(1e-3, build=_grouped),
    ),
}


@functools.cache
def _data() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images.reshape(-1, 64) / 16).astype(np.float32), digits.target.astype(np.int32)


def _start(random: np.random.Generator, case: Case) -> Any:
    sizes = {"first": (64, 32, 0.0), "hidden": (32, 32, case.bias), "last": (32, 10, 0.0)}
    return {
        name: {
            "kernel": jnp.asarray(
                random.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs), case.dtype
            ),
            "bias": jnp.full(outputs, bias, case.dtype),
        }
        for name, (inputs, outputs, bias) in sizes.items()
    }


def _loss(params: Any, images: Array, targets: Array) -> Array:
    """Cross-entropy, computed in float32 whatever the parameters rest in."""
    wide = jax.tree.map(lambda p: p.astype(np.float32), params)
    x = images
    for name in ("first", "hidden"):
        x = jax.nn.relu(x @ wide[name]["kernel"] + wide[name]["bias"])
    logits = x @ wide["last"]["kernel"] + wide["last"]["bias"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1).mean()


@functools.cache
def _program(build: Callable[..., Any]) -> Any:
    """A whole run, every step of it observed.

    The numbers of an optimizer are arguments, so that runs share what is compiled.
    """

    def run(numbers: Any, params: Any, images: Array, targets: Array, batches: Any) -> Any:
        tx = adam_jax.observe(build(*numbers), every=1)

        def step(carry: Any, batch: tuple[Array, Array]) -> Any:
            (params, state), (chosen, brightness) = carry, batch
            loss, grads = jax.value_and_grad(_loss)(
                params, images[chosen] * brightness, targets[chosen]
            )
            updates, state = tx.update(grads, state, params)
            return (adam_jax.apply_updates(params, updates), state), (
                loss,
                adam_jax.observations(state),
            )

        return lax.scan(step, (params, tx.init(params)), batches)[1]

    return jax.jit(run)


@functools.cache
def train(case: Case) -> Outcome:
    """Trains one case, and returns its losses and observations."""
    random = np.random.default_rng(0)
    images, targets = _data()
    params = _start(random, case)
    order = random.integers(len(targets), size=(STEPS, BATCH))
    brightness = np.where(case.shifts & (np.arange(STEPS) < SHIFT), 0, 1).astype(np.float32)
    numbers = tuple(map(np.float32, case[:3]))
    losses, seen = jax.device_get(
        _program(case.build)(numbers, params, images, targets, (order, brightness))
    )
    return Outcome(losses, seen)


def found(pathology: Pathology, case: Case) -> float:
    """The metric of a run: its median over the steps that matter."""
    seen = train(case).seen.get(
        pathology.metric, np.zeros(STEPS)
    )  # float32 parameters have no share that rounding loses
    return float(np.median(seen[pathology.steps]))


def table() -> Table:
    """A row for each pathology."""
    return Table(
        f"An MLP on scikit-learn's digits, {STEPS} steps of {BATCH}: what goes wrong, and the "
        "metric that shows it",
        ("", "metric", "limit", "sick", "healthy", "loss, sick", "loss, healthy"),
        [_row(name, its) for name, its in PATHOLOGIES.items()],
        f"Metrics: medians over all steps; of the first, over the 5 after step {SHIFT}, up to "
        "which images are black, and its losses are the largest after it. The other losses: means "
        "over the last 50 steps. With round_stochastically the bf16 run ends at "
        f"{_end(ROUNDED, last=True):.3f}.",
    )


def _row(name: str, its: Pathology) -> tuple[str, ...]:
    numbers = [f"{found(its, case):.3g}" for case in (its.sick, its.healthy)]
    losses = [f"{_end(case, last=not case.shifts):.3f}" for case in (its.sick, its.healthy)]
    return (
        name,
        f"`{its.metric}`",
        f"{'>' if its.sick_is_above else '<'} {its.limit:g}",
        *numbers,
        *losses,
    )


def _end(case: Case, last: bool) -> float:
    """The mean loss at the end, or the largest soon after the shift."""
    losses = train(case).losses
    return float(losses[-50:].mean() if last else losses[SHIFT:].max())


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pathologies", description=__doc__)
    parser.add_argument("--output", type=Path, help="a markdown file to write the table to")
    show([table()], parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
