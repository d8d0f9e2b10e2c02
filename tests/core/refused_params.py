"""Two parameters, one of them a matrix, for the tests of what is refused."""

import jax.numpy as jnp

PARAMS = {"head": {"b": jnp.ones(3), "w": jnp.ones((2, 3))}}
