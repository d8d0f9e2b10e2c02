"""Loss and accuracy of the demo's network."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from adam_jax._cli.network import Network
from adam_jax._core.leaves import as_wide

SLICE = 512  # images evaluated at once


def logits(network: Network, params: Any, images: Array) -> Any:
    """Computed in float32 from parameters of any dtype.

    So that what sets two runs apart is how their parameters round.
    """
    return network.apply(jax.tree.map(as_wide, params), images)


def evaluate(
    network: Network, params: Any, images: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
    """The mean loss and the accuracy, in slices of one size.

    So that every set of images shares one compiled function.
    """
    total, right = 0.0, 0
    for start in range(0, len(images), SLICE):
        x, y = images[start : start + SLICE], labels[start : start + SLICE]
        absent = SLICE - len(x)
        x = np.pad(x, ((0, absent), (0, 0), (0, 0), (0, 0)))
        losses, hits = jax.device_get(_score(network, params, x, np.pad(y, (0, absent))))
        total += float(losses[: len(y)].sum(dtype=np.float64))
        right += int(hits[: len(y)].sum())
    return total / len(images), right / len(images)


@functools.partial(jax.jit, static_argnums=0)
def _score(network: Network, params: Any, images: Array, labels: Array) -> tuple[Array, Array]:
    scores = logits(network, params, images)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels), scores.argmax(
        -1
    ) == labels
