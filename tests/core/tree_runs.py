"""Drawn leaves, gradients that grow, and all optimizers by name."""

import jax
import jax.numpy as jnp
import numpy as np

import adam_jax


def draw(shape, dtype=jnp.float32, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1j * np.random.default_rng(seed + 1).normal(size=shape)
    return jnp.asarray(values, dtype)


def scale(factor, leaf):
    return leaf if leaf.dtype == jax.dtypes.float0 else leaf * jnp.asarray(factor, leaf.dtype)


MEMBERS = {name: getattr(adam_jax, name) for name in adam_jax.family.__all__}
