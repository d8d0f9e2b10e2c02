"""Leaves of many kinds, gradients of many sizes, and steps whose states are observed."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import QUICKLY, has_float16

import adam_jax as aj

RATE, EPS, CLIP, STEPS = 0.01, 0.3, 0.5, 3
ALL = 10**7
"""A sample of every element."""

draw = np.random.default_rng(0)


def some(shape, dtype=jnp.float32, scale=1.0):
    made = draw.standard_normal(shape) * scale
    if jnp.issubdtype(dtype, jnp.complexfloating):
        made = made + 1j * draw.standard_normal(shape) * scale
    return jnp.asarray(made, dtype)


PARAMS = {
    "w": some((24, 20)),
    "b": some(
        (40,), jnp.bfloat16, 30 * 10.0 ** np.linspace(-4, 0, 40)
    ),  # the smallest move, the largest do not
    "h": some((40,), jnp.float16 if has_float16() else jnp.bfloat16, 30.0),
    "z": some((40,), jnp.complex64),
    "s": some(()),
    "empty": jnp.zeros((0, 3)),
    "n": jnp.arange(3),
    "none": None,
}


def gradients(params=PARAMS):
    """Of many sizes, so that ε rules some elements and not others."""

    def one(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        sizes = jnp.asarray(10.0 ** draw.uniform(-2, 1, leaf.shape), jnp.float32)
        return (some(leaf.shape, leaf.dtype) * sizes.astype(leaf.dtype)).astype(leaf.dtype)

    return jax.tree.map(one, params)


COURSE = [gradients() for _ in range(STEPS)]


def wide(x):
    """A leaf in double precision."""
    return np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)


def run(tx, course=COURSE, params=PARAMS, compiled=False, options=QUICKLY):
    """(params before, state before, gradients, updates, state after) of each step.

    Operation by operation: most operations of one optimizer are those of another one, and are
    compiled once for all of them. Where it matters what XLA makes of a whole step, or operations
    have shapes of their own, the step is compiled."""

    @functools.partial(jax.jit, compiler_options=options)
    def step(params, state, grads):
        updates, after = tx.update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), after, updates

    with contextlib.nullcontext() if compiled else jax.disable_jit():
        state, steps = jax.jit(tx.init)(params), []
        for grads in course:
            moved, after, updates = step(params, state, grads)
            steps.append((params, state, grads, updates, after))
            params, state = moved, after
    return steps


def rms(x):
    return np.sqrt(np.mean(np.abs(x) ** 2)) if len(x) else 0.0


def joined(parts):
    return np.concatenate([np.ravel(part) for part in parts]) if parts else np.zeros(0)


CODES = aj.storage.Codes(smallest=0)
