"""What hurts today, each pain beside its cure, from one run: `python -m benchmarks.pains`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import adam_jax
from benchmarks._table import Table, show
from benchmarks.accuracy import B2S, bfloat16_nu, scheduled_extremes, update_errors


def worst_error() -> tuple[str, str, str]:
    """The largest median error of an update over the decays.

    At steps where the arithmetic and not the state limits it.
    """
    rows = list(update_errors(B2S, (1, 10, 100, 1000)))
    worst = {
        name: max(row.errors[name].median for row in rows if row.errors[name])
        for name in ("Optax", "ours")
    }  # type: ignore[union-attr]
    return (
        "worst median error of an update in 1,000 steps, β₂ 0.9 … 0.999999",
        f"{worst['Optax']:.1e}",
        f"{worst['ours']:.1e}",
    )


def scheduled_beta() -> tuple[str, str, str]:
    """The shortest step, relative to what it should be, after β₂ has changed."""
    found = scheduled_extremes()
    return (
        "shortest step after β₂ goes from 0.9 to 0.999 (exact: 1)",
        f"{found['Optax'][0]:.2f}",
        f"{found['ours'][0]:.5f}",
    )


def frozen_moment() -> tuple[str, str, str]:
    """ν of bfloat16 parameters, after a spike and ten thousand ordinary steps."""
    found = bfloat16_nu()
    pain = f"bf16: ν, 10,000 steps after a spike (exact: {found['exact']:.2g})"
    return pain, f"{found['Optax']:.2g}", f"{found['ours']:.2g}"


def half_precision_zero() -> tuple[str, str, str]:
    """The first update of a float16 parameter whose gradient is 0."""
    return "f16: update for a gradient of 0", *_both(
        lambda tx: _text(_updates(tx(1e-3), [0.0], jnp.float16)[-1])
    )


def after_overflow() -> tuple[str, str, str]:
    """The update 20,000 steps after one gradient of 1e20, at β₂ = 0.99 and learning rate 1."""
    grads = [1e20] + [1.0] * 20_000
    return (
        "update 20,000 steps after one gradient of 1e20, β₂ = 0.99",
        *_both(lambda tx: _text(_updates(tx(1.0, b2=0.99), grads, jnp.float32)[-1])),
    )


def wrong_number() -> tuple[str, str, str]:
    """What a β₁ of 1.5 leads to."""
    return "adam(1e-3, b1=1.5)", *_both(lambda tx: _outcome(lambda: tx(1e-3, b1=1.5)))


def wrong_shape() -> tuple[str, str, str]:
    """What a gradient of another shape than its parameter leads to."""

    def update(tx: Callable[..., Any]) -> str:
        made = tx(1e-3)
        return _outcome(lambda: made.update(jnp.ones((2, 3)), made.init(jnp.ones(3))))

    return "gradient of shape (2, 3) for a parameter of shape (3,)", *_both(update)


def visible() -> tuple[str, str, str]:
    """How a transformation prints."""
    return "print(adam(1e-3))", *_both(
        lambda tx: repr(tx(1e-3)).split(" at 0x")[0].split("<locals>")[0][:72]
    )


def _both(measure: Callable[[Callable[..., Any]], str]) -> tuple[str, str]:
    return measure(optax.adam), measure(adam_jax.adam)


def _updates(tx: Any, grads: list[float], dtype: Any) -> np.ndarray:
    values = jnp.asarray(grads, dtype)[:, None]
    run = jax.jit(
        lambda values: lax.scan(
            lambda state, g: tx.update(g, state)[::-1], tx.init(values[0]), values
        )[1]
    )
    return np.asarray(run(values), np.float64)[:, 0]


def _text(number: float) -> str:
    return f"{number + 0.0:.4g}"


def _outcome(action: Callable[[], Any]) -> str:
    try:
        action()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}, and why"
    return "accepted"


PAINS = (
    worst_error,
    scheduled_beta,
    frozen_moment,
    half_precision_zero,
    after_overflow,
    wrong_number,
    wrong_shape,
    visible,
)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pains", description=__doc__)
    parser.add_argument("--output", type=Path, help="a markdown file to write the table to")
    options = parser.parse_args()
    show(
        [Table("What hurts today", ("", "Optax", "adam_jax"), [pain() for pain in PAINS])],
        options.output,
    )


if __name__ == "__main__":
    main()
