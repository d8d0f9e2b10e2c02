"""What rounding does to ν, and what the codes of eight bits can hold.

`python -m benchmarks.freezing`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import adam_jax
from adam_jax._core.configuration import slots_of
from adam_jax.storage import Codes, Float
from adam_jax.storage.codec import Codec
from adam_jax.storage.stored_leaf import unpack_moment
from benchmarks._table import Table, show

B2 = 0.999
ELEMENTS = 4096
NOISY = 4000
STEPS = (1, 10, 100, 1000, 10_000, 20_000)
NEAREST, STOCHASTIC, EIGHT = "bf16, nearest", "bf16, stochastic", "8-bit, stochastic"
OPTAX = "Optax, bf16 parameters"
FORMS = {
    NEAREST: Float(jnp.bfloat16, rounding="nearest"),
    STOCHASTIC: "bfloat16",
    "8-bit, nearest": Codes(rounding="nearest"),
    EIGHT: "8bit",
}


def constant(step: Any) -> Any:
    """A gradient that is always 1: ν should go to 1."""
    return jnp.ones_like(step, jnp.float32)


def spike(step: Any) -> Any:
    """A gradient of 100, and 0.01 ever after: ν should fall from 10 to 0.0001."""
    return jnp.where(step == 0, jnp.float32(100), jnp.float32(0.01))


def exact(gradient: Callable[[Any], Any]) -> np.ndarray:
    """ν after each step, in float64."""
    squares = np.asarray(gradient(jnp.arange(max(STEPS))), np.float64) ** 2
    nu = np.empty(len(squares))
    value = 0.0
    for step, square in enumerate(squares):
        value += (1 - B2) * (square - value)
        nu[step] = value
    return nu


def tracked(
    tx: optax.GradientTransformation,
    dtype: Any,
    gradient: Callable[[Any], Any],
    read: Callable[[Any], Any],
) -> np.ndarray:
    """The mean over the elements of ν at rest, after each step."""
    params = jnp.zeros(ELEMENTS, dtype)

    def step(state: Any, count: Any) -> tuple[Any, Any]:
        _, state = tx.update(jnp.full(ELEMENTS, gradient(count)).astype(dtype), state, params)
        return state, jnp.mean(read(state))

    return np.asarray(
        jax.jit(lambda: lax.scan(step, tx.init(params), jnp.arange(max(STEPS)))[1])(), np.float64
    )


def curves(gradient: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    """ν after each step by how it rests."""
    theirs = optax.scale_by_adam(b2=B2)
    found = {
        "exact": exact(gradient),
        OPTAX: tracked(theirs, jnp.bfloat16, gradient, lambda state: state.nu.astype(jnp.float32)),
    }
    for label, form in FORMS.items():
        tx = adam_jax.track_moments(None, B2, storage=form)  # type: ignore[arg-type]
        found[label] = tracked(tx, jnp.float32, gradient, functools.partial(read, tx, "nu"))
    return found


def read(tx: Any, moment: str, state: Any) -> Any:
    """A moment of a state of one leaf, in float32, however it is stored."""
    (stored,) = unpack_moment(slots_of(tx)[moment], getattr(state, moment), state.scales)
    return stored.widen()


def table(title: str, found: dict[str, np.ndarray]) -> Table:
    """A row for each way to rest."""
    rows = [(label, *(f"{nu[step - 1]:.4g}" for step in STEPS)) for label, nu in found.items()]
    return Table(
        title,
        ("", *(f"step {step:,}" for step in STEPS)),
        rows,
        f"Means over {ELEMENTS:,} elements, β₂ = {B2}.",
    )


def noisy(storage: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """μ and ν at rest, and the update, of the last steps under normally distributed gradients.

    (steps, elements).
    """
    track = adam_jax.track_moments(b2=B2, storage=storage)  # type: ignore[arg-type]
    tx = adam_jax.chain(track, adam_jax.correct_bias(), adam_jax.scale_by_moments())

    def step(state: Any, key: Any) -> tuple[Any, Any]:
        update, state = tx.update(jax.random.normal(key, (ELEMENTS,)), state)
        return state, (*(read(track, moment, state[0]) for moment in ("mu", "nu")), update)

    keys = jax.random.split(jax.random.key(0), NOISY)
    found = jax.jit(lambda: lax.scan(step, tx.init(jnp.zeros(ELEMENTS)), keys)[1])()
    mu, nu, update = (np.asarray(part[-500:], np.float64) for part in found)
    return mu, nu, update


def noise_table() -> Table:
    """What rounding leaves in the moments, and what that does to the steps."""

    def size(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(x**2)))

    mu, nu, update = noisy("float32")
    rows = []
    for storage in ("bfloat16", "8bit"):
        its_mu, its_nu, its_update = noisy(storage)
        errors = (f"{size(its_mu - mu) / size(mu):.1%}", f"{size(its_nu - nu) / np.mean(nu):.1%}")
        rows.append(
            (
                storage,
                *errors,
                f"{np.mean(its_nu) / np.mean(nu) - 1:+.1%}",
                f"{size(its_update) / size(update) - 1:+.1%}",
            )
        )
    heads = (
        "storage",
        "error of μ, rms",
        "error of ν, rms",
        "error of ν, mean",
        "length of updates",
    )
    note = f"The last 500 of {NOISY:,} steps of {ELEMENTS:,} elements, β₁ = 0.9, β₂ = {B2}."
    return Table("Under normally distributed gradients, relative to float32", heads, rows, note)


def spacings(codec: Codec, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Every positive value that codes can have, and the distance to the next as a share of it."""
    unit = codec.first_exponent(largest)
    codes = np.arange(1, np.iinfo(codec.dtype).max + 1).astype(codec.dtype)
    values = np.asarray(codec.widen(jnp.asarray(codes), unit), np.float64)
    return values[:-1], np.diff(values) / values[:-1]


def draw(found: dict[str, np.ndarray], path: Path) -> None:
    """Two panels: ν under a constant gradient, and the steps between codes."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.9), dpi=200, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, max(STEPS) + 1)
    looks = {
        "exact": ("black", 4.0),
        STOCHASTIC: ("#56b4e9", 2.4),
        EIGHT: ("#009e73", 1.2),
        OPTAX: ("#cc79a7", 1.6),
        NEAREST: ("#d55e00", 1.6),
    }
    for label, (colour, width) in looks.items():
        left.plot(steps, found[label], color=colour, linewidth=width, label=label)
    left.set(
        xscale="log",
        xlabel="step",
        ylabel="mean of ν",
        title="ν under a gradient of 1: nearest rounding freezes",
    )
    left.legend(frameon=False, loc="upper left")

    for signed, label, colour, width in ((True, "μ", "#e69f00", 3.5), (False, "ν", "#009e73", 1.2)):
        values, between = spacings(Codec(signed), 1.0)
        right.step(
            values, between, where="post", color=colour, linewidth=width, label=f"8-bit {label}"
        )
    size = 2.0 ** np.arange(-32, 34)
    right.fill_between(
        size, 2.0**-8, 2.0**-7, color="#56b4e9", alpha=0.5, linewidth=0, label="bf16"
    )
    right.axvline(1, color="black", linewidth=0.8, linestyle=":")
    right.text(1.6, 2.0**-5.9, "the largest,\na step ago", fontsize=8)
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    right.set(
        xlabel="size, relative to the leaf's largest",
        ylabel="step to the next code / size",
        title="Steps between codes",
    )
    right.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.62))
    for panel in (left, right):
        panel.title.set_fontsize(10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Computes, prints and draws."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.freezing", description=__doc__)
    parser.add_argument("--output", type=Path, help="a markdown file to write the tables to")
    parser.add_argument("--figure", type=Path, help="an image file to draw to (needs matplotlib)")
    options = parser.parse_args(arguments)
    found = curves(constant)
    tables = [
        table("ν under a constant gradient of 1", found),
        table("ν after a gradient of 100 among ones of 0.01", curves(spike)),
        noise_table(),
    ]
    show(tables, options.output)
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
