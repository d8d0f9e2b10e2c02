"""The networks that benchmarks train."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks._data import BEFORE, CHARACTERS, CONTEXT, EMBEDDED, HEADS, LAYERS, WIDTH, WORDS

# The networks: `start` makes float32 parameters, `logits` takes them and a batch of inputs.


def start_mlp(random: np.random.Generator) -> Any:
    """784-1000-1000-10."""
    return [_layer(random, 784, 1000, 2), _layer(random, 1000, 1000, 2), _layer(random, 1000, 10)]


def mlp(params: Any, images: Array) -> Array:
    """Logits (n, 10)."""
    x = images.reshape(len(images), -1) / jnp.float32(255)
    for layer in params[:-1]:
        x = jax.nn.relu(_apply(layer, x))
    return _apply(params[-1], x)


def start_small_mlp(random: np.random.Generator) -> Any:
    """784-300-100-10."""
    return [_layer(random, 784, 300, 2), _layer(random, 300, 100, 2), _layer(random, 100, 10)]


def start_words(random: np.random.Generator) -> Any:
    """An embedding whose rows are used as often as words are, a hidden layer.

    And an output for each word.
    """
    return {
        "embedding": random.standard_normal((WORDS, EMBEDDED), np.float32),
        "hidden": _layer(random, BEFORE * EMBEDDED, EMBEDDED, 2),
        "head": _layer(random, EMBEDDED, WORDS),
    }


def next_word(params: Any, before: Array) -> Array:
    """Logits (n, WORDS)."""
    x = params["embedding"][before].reshape(len(before), -1)
    return _apply(params["head"], jax.nn.relu(_apply(params["hidden"], x)))


def start_convolutional(random: np.random.Generator) -> Any:
    """Two convolutions of 3×3, to 16 and 32 features, and two dense layers."""
    sizes = ((9, 16, 2), (9 * 16, 32, 2), (7 * 7 * 32, 128, 2), (128, 10, 1))
    return [_layer(random, *size) for size in sizes]


def convolutional(params: Any, images: Array) -> Array:
    """Logits (n, 10)."""
    x = images[..., None] / jnp.float32(255)
    for layer in params[:2]:
        x = _halve(jax.nn.relu(_apply(layer, _patches(x))))
    return _apply(params[3], jax.nn.relu(_apply(params[2], x.reshape(len(x), -1))))


def _patches(images: Array) -> Array:
    """The 3×3 around each pixel, so that a convolution is a product.

    In a loop on a CPU, XLA's own takes seven times as long.
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate(
        [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1
    )


def _halve(images: Array) -> Array:
    n, height, width, features = images.shape
    return images.reshape(n, height // 2, 2, width // 2, 2, features).max((2, 4))


def start_transformer(random: np.random.Generator, layers: int = LAYERS) -> Any:
    """Pre-norm, without positions: see `transformer`."""
    inner = 1 / (
        2 * layers
    )  # what a residual branch adds, so that the sum of all has the size of one

    def block() -> Any:
        return {
            "attention_norm": np.ones(WIDTH, np.float32),
            "queries_keys_values": _layer(random, WIDTH, 3 * WIDTH),
            "attended": _layer(random, WIDTH, WIDTH, inner),
            "mlp_norm": np.ones(WIDTH, np.float32),
            "up": _layer(random, WIDTH, 4 * WIDTH, 2),
            "down": _layer(random, 4 * WIDTH, WIDTH, inner),
        }

    return {
        "embedding": random.standard_normal((CHARACTERS, WIDTH), np.float32),
        "blocks": [block() for _ in range(layers)],
        "norm": np.ones(WIDTH, np.float32),
        "head": _layer(random, WIDTH, CHARACTERS),
    }


def transformer(params: Any, characters: Array) -> Array:
    """Logits (n, CONTEXT, CHARACTERS).

    Attention fades with distance (ALiBi, Press et al. 2022): in the few hundred steps that fit
    here, learned positions do not get beyond the frequencies of pairs of characters.
    """
    distance = jnp.arange(CONTEXT)[:, None] - jnp.arange(CONTEXT)
    slopes = 4.0 ** -jnp.arange(HEADS)[:, None, None]
    fade = jnp.where(distance >= 0, -slopes * distance, -jnp.inf)
    x = params["embedding"][characters]
    for block in params["blocks"]:
        x = x + _apply(
            block["attended"],
            _attend(_apply(block["queries_keys_values"], _norm(block["attention_norm"], x)), fade),
        )
        x = x + _apply(block["down"], jax.nn.relu(_apply(block["up"], _norm(block["mlp_norm"], x))))
    return _apply(params["head"], _norm(params["norm"], x))


def _attend(queries_keys_values: Array, fade: Array) -> Array:
    n = len(queries_keys_values)
    queries, keys, values = jnp.moveaxis(
        queries_keys_values.reshape(n, CONTEXT, 3, HEADS, -1), 2, 0
    )
    scores = jnp.einsum("nthd,nshd->nhts", queries, keys) / math.sqrt(WIDTH // HEADS)
    return jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores + fade), values).reshape(
        n, CONTEXT, WIDTH
    )


def _norm(scale: Array, x: Array) -> Array:
    return scale * x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _layer(random: np.random.Generator, inputs: int, outputs: int, gain: float = 1) -> Any:
    kernel = random.standard_normal((inputs, outputs), np.float32) * math.sqrt(gain / inputs)
    return {"kernel": kernel, "bias": np.zeros(outputs, np.float32)}


def _apply(layer: Any, x: Array) -> Array:
    product: Array = x @ layer["kernel"] + layer["bias"]
    return product
