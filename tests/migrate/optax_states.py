"""States of transformations after some steps on gradients of all sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import normals

RATE = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, 400)
START = {"w": normals(4, 6), "b": normals(5, seed=1)}


def scan(tx, state, grads, params=START):
    """The state after some steps, and their updates; the parameters stand still."""
    return jax.lax.scan(lambda state, grad: tx.update(grad, state, params)[::-1], state, grads)


LARGE = {"w": jnp.ones((64, 80)), "b": jnp.ones(3)}


def steps_of(tx, params, steps=5):
    """A state after some steps on gradients of all sizes, that do not depend on the parameters."""
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(
        rng.standard_normal((steps, *p.shape)) * 10 ** rng.uniform(-6, 3, (steps, *p.shape)),
        p.dtype,
    )
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(lambda grads: scan(tx, tx.init(params), grads, params)[0])(
            jax.tree.map(draw, params)
        )
