"""A step with moments at rest can be exported for every platform, stored, and called where it is read again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import adam_jax
from adam_jax.storage import Codes, Float

PLATFORMS = ("cpu", "cuda", "tpu")

STORAGES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "8bit": "8bit",
    "float8": Float(jnp.float8_e4m3fn),
    "16bit": Codes(16),
    "nearest": Codes(rounding="nearest"),
    "pair": ("bfloat16", "8bit"),
}
LINKS = {"round_stochastically": adam_jax.round_stochastically(), "compensate": adam_jax.compensate()}


@pytest.fixture(params=[*STORAGES, *LINKS])
def exported(request):
    """(step, its arguments, what `jax.export` made of it for all platforms)"""
    link = LINKS.get(request.param)
    adam = adam_jax.adam(0.1, storage=STORAGES.get(request.param, "8bit"))
    tx, dtype = (adam_jax.chain(adam, link), jnp.bfloat16) if link else (adam, jnp.float32)
    draw = np.random.default_rng(0).normal
    params = {"w": jnp.asarray(draw(size=(64, 128)), dtype), "b": jnp.asarray(draw(size=3), dtype)}
    leaves, treedef = jax.tree.flatten((params, tx.init(params), jax.tree.map(lambda p: p * p, params)))

    @jax.jit
    def step(*leaves):  # of leaves: to store a state's own classes, the user has to name them to JAX
        params, state, gradients = jax.tree.unflatten(treedef, leaves)
        updates, state = tx.update(gradients, state, params)
        with jax.numpy_dtype_promotion("standard"):  # Optax adds updates of another dtype than the parameters'
            return jax.tree.leaves((optax.apply_updates(params, updates), state))

    return step, leaves, export.export(step, platforms=PLATFORMS)(*leaves)


def check(step, leaves, exported):
    expected = step(*leaves)
    assert exported.platforms == PLATFORMS
    assert types(exported.in_avals) == types(leaves)
    # Parameters and state come back as what they were, so that the next step takes them.
    assert types(exported.out_avals) == types(expected) == types(leaves[: len(expected)])
    for found, leaf in zip(exported.call(*leaves), expected, strict=True):
        np.testing.assert_array_equal(found, leaf)


def types(leaves):
    return [(leaf.shape, leaf.dtype) for leaf in leaves]


def test_an_exported_step_is_the_jitted_step(exported):
    check(*exported)


def test_a_step_that_was_stored_is_the_jitted_step(exported):
    pytest.importorskip("flatbuffers", reason="JAX stores exported functions by flatbuffers, which it does not install")
    step, leaves, made = exported
    check(step, leaves, export.deserialize(made.serialize()))
