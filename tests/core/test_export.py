"""A step with moments at rest can be exported for every platform, stored, and called where it is
read again.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normals
from jax import export

import adam_jax
from adam_jax.storage import Codes, Float

PLATFORMS = ("cpu", "cuda", "tpu")

# That of every member in float32 is exported in `test_transforms.py`.
STORAGES = {
    "bfloat16": "bfloat16",
    "8bit": "8bit",
    "float8": Float(jnp.float8_e4m3fn),
    "nearest": Codes(rounding="nearest"),
}
LINKS = {
    "round_stochastically": adam_jax.round_stochastically(),
    "compensate": adam_jax.compensate(),
}


@functools.cache
def exported(name):
    """(its arguments, what `jax.export` made of it for all platforms, what the jitted
    step returns)
    """
    link = LINKS.get(name)
    adam = adam_jax.adam(0.1, storage=STORAGES.get(name, "8bit"))
    tx, dtype = (adam_jax.chain(adam, link), jnp.bfloat16) if link else (adam, jnp.float32)
    params = {"w": normals(64, 128, dtype=dtype), "b": normals(3, seed=1, dtype=dtype)}
    leaves, treedef = jax.tree.flatten((params, jax.jit(tx.init)(params), params))

    @jax.jit
    def step(
        *leaves,
    ):  # of leaves: to store a state's own classes, the user has to name them to JAX
        params, state, gradients = jax.tree.unflatten(treedef, leaves)
        updates, state = tx.update(gradients, state, params)
        with jax.numpy_dtype_promotion(
            "standard"
        ):  # Optax adds updates of another dtype than the parameters'
            return jax.tree.leaves((optax.apply_updates(params, updates), state))

    return leaves, export.export(step, platforms=PLATFORMS)(*leaves), step(*leaves)


def types(leaves):
    return [(leaf.shape, leaf.dtype) for leaf in leaves]


@pytest.mark.parametrize("name", [*STORAGES, *LINKS])
def test_a_step_that_was_stored_is_the_jitted_step(name):
    pytest.importorskip(
        "flatbuffers",
        reason="JAX stores exported functions by flatbuffers, which it does not install",
    )
    leaves, made, expected = exported(name)
    stored = export.deserialize(made.serialize())
    for its in (made, stored):
        assert its.platforms == PLATFORMS
        assert types(its.in_avals) == types(leaves)
        # Parameters and state come back as what they were, so that the next step takes them.
        assert types(its.out_avals) == types(expected) == types(leaves[: len(expected)])
    for found, leaf in zip(stored.call(*leaves), expected, strict=True):
        np.testing.assert_array_equal(found, leaf)
