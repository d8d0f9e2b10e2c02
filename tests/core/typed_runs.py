"""Parameters of several dtypes, bfloat16 gradients, and the updates of every step along them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import normals

BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
PARAMS = {"w": normals(3, 2), "b": normals(3, seed=1), "n": jnp.arange(3)}


def gradients(steps, dtype=BFLOAT16, seed=2):
    """Of `steps` steps: bfloat16 numbers, in a dtype. That of the integer leaf is 0."""
    rng = np.random.default_rng(seed)

    def leaf(p):
        drawn = (
            rng.standard_normal((steps, *p.shape))
            if jnp.issubdtype(p.dtype, jnp.inexact)
            else np.zeros((steps, *p.shape))
        )
        return jnp.asarray(drawn, BFLOAT16).astype(
            dtype if jnp.issubdtype(p.dtype, jnp.inexact) else p.dtype
        )

    return jax.tree.map(leaf, PARAMS)


def course(tx, params, grads):
    """Parameters, state and the updates of every step, of a scan: it refuses a state or parameters
    that change their types.
    """

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return (optax.apply_updates(params, updates), state), updates

    (params, state), updates = jax.lax.scan(step, (params, tx.init(params)), grads)
    return params, state, updates


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)
