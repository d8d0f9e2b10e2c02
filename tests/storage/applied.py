"""`optax.apply_updates` where dtypes may mix."""

import jax
import jax.numpy as jnp


def applied(params, updates):
    """What Optax's function of that name makes where dtypes may mix."""
    return jax.tree.map(
        lambda p, u: (p.astype(jnp.float32) + u.astype(jnp.float32)).astype(p.dtype),
        params,
        updates,
    )
