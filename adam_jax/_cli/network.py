"""The demo's network."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from adam_jax._cli.data import halve


def convolve(images: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """A 3×3 convolution that keeps the size, as one matrix product.

    Mapped over rates each network has its own kernel, and XLA has no fast code on the CPU for the
    grouped convolution that this becomes: as a batch of matrix products the sweep takes a tenth of
    the time.
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    columns = jnp.concatenate([padded[:, i : i + height] for i in range(3)], axis=-1)
    patches = jnp.concatenate([columns[:, :, j : j + width] for j in range(3)], axis=-1)
    return patches @ kernel.swapaxes(0, 1).reshape(-1, kernel.shape[-1])


class Network(nn.Module):
    """Two convolutions, each halving the image, and a dense layer.

    Images to logits (n, classes).
    """

    classes: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """The logits of a batch of images."""
        for features in (16, 32):
            images = halve(
                nn.relu(nn.Conv(features, (3, 3), conv_general_dilated=convolve)(images))
            )
        logits: Array = nn.Dense(self.classes)(images.reshape(len(images), -1))
        return logits
