"""Measures what outliers cost 8-bit moments: `python -m benchmarks.outliers --mnist mnist.npz`.

A linear layer predicts 192 pixels of a digit from 256 others. The loss of one output counts 10³ to
10⁶ times as much as that of the others, and so do its gradients: they are a row of the kernel, or a
column where the kernel is transposed. Adam in float32 does not notice. Codes that share one scale
with the outlier have no digits left. The loss is the mean over the other outputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adam_jax
from adam_jax.storage.formats import Codes
from benchmarks._data import MNIST, mnist, small_digits
from benchmarks._table import Table, show

FACTORS = (1.0, 1e3, 1e4, 1e5, 1e6)
FORMS = {
    "a scale per row": Codes(),
    "a scale per column": Codes(axis=-2),
    "a scale per leaf": Codes(axis=None),
}
OUTPUTS, INPUTS, BATCH = 192, 256, 64


def pixels(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (n, 256) and outputs (n, 192).

    The pixels in the middle of an image, dealt out in a fixed order, standardized.
    """
    middle = images[:, 3:25, 3:25].reshape(len(images), -1).astype(np.float32)
    order = np.random.default_rng(0).permutation(middle.shape[1])[: INPUTS + OUTPUTS]
    chosen = (middle[:, order] - middle[:, order].mean(0)) / (middle[:, order].std(0) + 1e-3)
    return chosen[:, :INPUTS], chosen[:, INPUTS:]


def trainer(inputs: Any, outputs: Any, steps: int, along: int) -> Any:
    """Returns a function that trains, and returns the mean squared error of each output.

    The function takes a storage, and the factor of the loss of output 0.

    Args:
      inputs: (n, 256).
      outputs: (n, 192).
      steps: of training.
      along: which axis of the kernel the outputs are: 0 if they are its rows, 1 if they are its
        columns.
    """

    def run(form: Any, factor: Any) -> Any:
        tx = adam_jax.adam(lambda count: 3e-3 * (1 - count / steps), storage=form)
        weights = jnp.ones(OUTPUTS).at[0].set(factor)

        def errors(kernel: Any, x: Any, y: Any) -> Any:
            return jnp.mean(jnp.square(x @ (kernel.T if along == 0 else kernel) - y), axis=0)

        def step(carry: Any, chosen: Any) -> Any:
            kernel, state = carry
            grads = jax.grad(
                lambda k: jnp.sum(weights * errors(k, inputs[chosen], outputs[chosen]))
            )(kernel)
            updates, state = tx.update(grads, state, kernel)
            return (adam_jax.apply_updates(kernel, updates), state), None

        kernel = jnp.zeros((OUTPUTS, INPUTS) if along == 0 else (INPUTS, OUTPUTS))
        order = jax.random.randint(jax.random.key(0), (steps, BATCH), 0, len(inputs))
        (kernel, _), _ = jax.lax.scan(step, (kernel, tx.init(kernel)), order)
        return errors(kernel, inputs, outputs)

    return jax.jit(run, static_argnums=0)


def rows(images: np.ndarray, steps: int) -> Iterator[tuple[str, ...]]:
    """A row of the table for each shape of outlier and each way to share scales."""
    inputs, outputs = map(jnp.asarray, pixels(images))
    for along, what in enumerate(("row", "column")):
        run = trainer(inputs, outputs, steps, along)
        exact = {factor: float(run("float32", factor)[1:].mean()) for factor in FACTORS}
        yield (f"outlier {what}", "float32", *(f"{exact[factor]:.4f}" for factor in FACTORS))
        for label, form in FORMS.items():
            losses = {factor: float(run(form, factor)[1:].mean()) for factor in FACTORS}
            yield (
                f"outlier {what}",
                label,
                *(f"{losses[factor] / exact[factor] - 1:+.1%}" for factor in FACTORS),
            )


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.outliers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mnist", type=Path, help=f"{MNIST}; default: the digits of scikit-learn")
    parser.add_argument("--steps", type=int, default=2000, help="of training; default: %(default)s")
    parser.add_argument("--output", type=Path, help="a markdown file to write the table to")
    options = parser.parse_args()
    data = mnist(options.mnist) if options.mnist else small_digits()
    found = Table(
        f"8-bit moments where gradients differ, {data.source}: a kernel of {OUTPUTS} × {INPUTS}, "
        f"{options.steps} steps",
        ("", "moments", *(f"{factor:,.0f} ×" for factor in FACTORS)),
        list(rows(data.train.inputs, options.steps)),
        "Mean squared error of the other outputs: of float32, and how far above it the loss of "
        "8-bit moments is.",
    )
    show([found], options.output)


if __name__ == "__main__":
    main()
