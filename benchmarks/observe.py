"""What looking costs: `python -m benchmarks.observe`.

A training step, gradients and all, of the MLP 784-1000-1000-10 and of a tree of 500 small leaves,
with AdamW alone, and observed at every tenth and at every step. Contenders take turns call by call,
and each call is compared with the one of AdamW beside it. AdamW takes part twice: the ratio of it
to itself is what this machine cannot tell from 1.

A look falls into one call of ten: the cost of a step is the mean over such ten, so calls are added
up ten by ten.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import adam_jax
from benchmarks._networks import mlp, start_mlp
from benchmarks._table import Table, show
from benchmarks._trees import TREES, WARM_UP

EVERY, BATCH = 10, 128
ADAMW = adam_jax.adamw(1e-4)
PLAIN = "not observed"
CONTENDERS = {
    PLAIN: ADAMW,
    "again": ADAMW,
    f"every={EVERY}": adam_jax.observe(ADAMW, every=EVERY),
    "every=1": adam_jax.observe(ADAMW, every=1),
}


class Tree(NamedTuple):
    """What is trained.

    Attributes:
      start: makes the parameters.
      loss: of parameters and a batch of images (n, 28, 28).
    """

    start: Callable[[], Any]
    loss: Callable[[Any, Array], Array]


def _many() -> Any:
    return [np.full(shape, 0.01, np.float32) for shape in TREES["500x32x32"]]


def _through(params: Any, images: Array) -> Array:
    """All leaves one after the other."""
    x = images.reshape(len(images), -1)[:, :32]
    for leaf in params:
        x = jnp.tanh(x @ leaf + x)
    return jnp.mean(x * x)


WORK = {
    "MLP 784-1000-1000-10": Tree(
        lambda: start_mlp(np.random.default_rng(0)),
        lambda params, images: jnp.mean(jnp.square(mlp(params, images))),
    ),
    "500 leaves of 32 × 32": Tree(_many, _through),
}


class Run:
    """A compiled, donated step and the arrays that it moves."""

    def __init__(self, tx: Any, tree: Tree) -> None:
        def step(params: Any, state: Any, images: Array) -> Any:
            updates, state = tx.update(jax.grad(tree.loss)(params, images), state, params)
            return optax.apply_updates(params, updates), state

        self.images = jnp.linspace(0, 255, BATCH * 784, dtype=jnp.float32).reshape(BATCH, 28, 28)
        params = jax.tree.map(jnp.asarray, tree.start())
        self.carry = params, tx.init(params)
        jax.clear_caches()
        gc.collect()
        begun = time.perf_counter()
        self.call = jax.jit(step, donate_argnums=(0, 1)).lower(*self.carry, self.images).compile()
        self.compiled = time.perf_counter() - begun

    def seconds(self) -> float:
        """Of a step."""
        begun = time.perf_counter()
        self.carry = self.call(*self.carry, self.images)
        jax.block_until_ready(self.carry)
        return time.perf_counter() - begun


def measure(tree: Tree, rounds: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Seconds a step by contender, each the mean of ten, (rounds,); and what compiling took."""
    runs = {name: Run(tx, tree) for name, tx in CONTENDERS.items()}
    names = list(runs)
    calls: dict[str, list[float]] = {name: [] for name in names}
    for call in range(-WARM_UP, rounds * EVERY):
        for name in names[call % len(names) :] + names[: call % len(names)]:
            took = runs[name].seconds()
            if call >= 0:
                calls[name].append(took)
    seconds = {name: np.reshape(its, (rounds, EVERY)).mean(1) for name, its in calls.items()}
    return seconds, {name: run.compiled for name, run in runs.items()}


def table(rounds: int) -> Table:
    """A row for each tree and contender."""
    rows = []
    for name, tree in WORK.items():
        seconds, compiled = measure(tree, rounds)
        for contender, its in seconds.items():
            low, median, high = np.quantile(its / seconds[PLAIN], (0.25, 0.5, 0.75))
            cells = (
                f"{np.median(its) * 1e3:.2f} ms",
                f"{median:.3f} ({low:.3f} to {high:.3f})",
                f"{compiled[contender]:.2f} s",
            )
            rows.append((name, contender, *cells))
    return Table(
        f"A training step of AdamW on {BATCH} images, observed and not",
        ("tree", "", "step", "× not observed (quartiles)", "compile"),
        rows,
        f"Medians of {rounds} rounds; a round is the mean of {EVERY} steps, of which every={EVERY} "
        "looks at one.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.observe", description=__doc__)
    parser.add_argument("--rounds", type=int, help="of ten timed steps each; default: 40")
    parser.add_argument("--quick", action="store_true", help="2 rounds: to see that it runs")
    parser.add_argument("--output", type=Path, help="a markdown file to write the table to")
    options = parser.parse_args(arguments)
    show([table(options.rounds or (2 if options.quick else 40))], options.output)


if __name__ == "__main__":
    main()
