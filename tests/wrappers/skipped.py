"""Parameters of several dtypes, good and non-finite gradients for them, and jitted steps along
them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import normals

seeds = itertools.count()


def some(shape, dtype=jnp.float32):
    return normals(*shape, seed=next(seeds), dtype=dtype)


PARAMS = {
    "w": some((64, 80)),
    "b": some((7,), jnp.bfloat16).at[0].set(-0.0),
    "s": some(()),
    "n": jnp.arange(3),
    "none": None,
}


def gradients(scale=1.0):
    made = {
        name: some(leaf.shape, leaf.dtype) * scale
        if name != "n"
        else np.zeros(3, jax.dtypes.float0)
        for name, leaf in PARAMS.items()
        if leaf is not None
    }
    return made | {"none": None}


def poisoned(gradients, leaf="w", value=np.nan):
    sick = gradients[leaf]
    return gradients | {leaf: sick.at[(-1,) * sick.ndim].set(value)}


@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates), state


def run(tx, params, course):
    """Parameters and state after a course of gradients, each step jitted as a user would; compiled
    once for equal `tx`.
    """
    state = tx.init(params)
    for gradients in course:
        params, state = step(tx, params, state, gradients)
    return params, state
