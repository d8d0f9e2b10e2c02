"""The numbers that say how a run is doing, from samples of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Vectors: TypeAlias = dict[str, Array]


class SampledLeaf(NamedTuple):
    """Elements taken from one leaf, or from several.

    Attributes:
      of: what is known of them, float32 vectors by name.
      weights: how many elements of its leaf each stands for.
    """

    of: Vectors
    weights: np.ndarray

    def mean(self, name: str, among: str | None = None) -> Array:
        """The mean; of nothing, 0."""
        weights = self.weights * (np.float32(1) if among is None else self.of[among])
        return jnp.sum(weights * self.of[name]) / nonzero(jnp.sum(weights))

    def rms(self, x: Array, among: str | None = None) -> Array:
        """The root mean square of a vector beside these."""
        top = jnp.max(jnp.abs(x), initial=0)
        scaled = x / nonzero(top)  # squares overflow
        return top * jnp.sqrt(self._replace(of=self.of | {"x": scaled * scaled}).mean("x", among))

    def quantile(self, q: float, x: Array, among: str) -> Array:
        """The quantile of a vector beside these; of nothing, 0."""
        inorder, weights = lax.sort((x, jnp.asarray(self.weights) * self.of[among]), num_keys=1)
        reached = jnp.cumsum(weights)
        place = jnp.sum(reached < np.float32(q) * reached[-1])
        found = jnp.where(reached[-1] > 0, inorder[jnp.minimum(place, len(x) - 1)], 0)
        poisoned = jnp.any(jnp.isnan(inorder) & (weights > 0))  # they are sorted behind all others
        return jnp.where(poisoned, np.float32(np.nan), found)


def stack_leaves(rows: Sequence[SampledLeaf]) -> SampledLeaf:
    """All of them as one, with leaves that have elements alone."""
    rows = [row for row in rows if row.weights.size]
    if not rows:
        return SampledLeaf({}, np.zeros(0, np.float32))
    return SampledLeaf(
        {name: jnp.concatenate([row.of[name] for row in rows]) for name in rows[0].of},
        np.concatenate([row.weights for row in rows]),
    )


class StepSample(NamedTuple):
    """What there is to see of a step: elements, and the gradient.

    Attributes:
      gradient: its norm.
      moved: updates and parameters.
      quotients: moments, and the directions that were made of them.
      unrounded: which 16-bit parameters the update would not move.
      codes: which are at an end.
      skipped: the counts of guards.
    """

    gradient: Array
    moved: SampledLeaf
    quotients: SampledLeaf
    unrounded: SampledLeaf
    codes: SampledLeaf
    skipped: list[Array]

    def metrics(self) -> dict[str, Array]:
        """Float32 scalars by the names in `METRICS`; 0 of what there is not."""
        found = {
            "gradient_norm": self.gradient,
            "skipped": sum(count.astype(np.float32) for count in self.skipped),
        }
        if self.moved.of:
            step, length = (self.moved.rms(self.moved.of[name]) for name in ("update", "parameter"))
            found |= {"update_rms": step, "update_ratio": step / nonzero(length)}
        if self.quotients.of:
            found |= self._quotient_metrics()
        if self.unrounded.of:
            found["stalled_fraction"] = self.unrounded.mean("stays", "moves")
        if self.codes.of:
            found["saturated_fraction"] = self.codes.mean("ends")
        return {name: jnp.asarray(found.get(name, 0), np.float32) for name in METRICS}

    def _quotient_metrics(self) -> dict[str, Array]:
        rows = self.quotients
        its = rows.of
        g, m = (its[name] / nonzero(rows.rms(its[name])) for name in ("gradient", "mean"))
        turned = rows._replace(of={"along": its["turn"] * g * m})
        return {
            "learning_rate_median": rows.quantile(0.5, its["rate"], "directed"),
            "learning_rate_p99": rows.quantile(0.99, its["rate"], "directed"),
            "eps_fraction": rows.mean("ruled_by_eps", "has_nu"),
            "normalized_gradient_rms": rows.rms(its["normalized"], "sized"),
            "momentum_cosine": turned.mean("along"),
            "signal_to_noise": rows.quantile(0.5, its["signal"], "sized"),
        }


METRICS = (
    "gradient_norm",
    "update_rms",
    "update_ratio",
    "learning_rate_median",
    "learning_rate_p99",
    "eps_fraction",
    "normalized_gradient_rms",
    "momentum_cosine",
    "signal_to_noise",
    "stalled_fraction",
    "saturated_fraction",
    "skipped",
)
"""What is measured, of all parameters and of each group. `adam_jax.observe` says what they mean."""


def nonzero(x: Array) -> Array:
    """A divisor; NaN stays."""
    return jnp.where(x == 0, 1, x)
