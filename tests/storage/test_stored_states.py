"""Stored moments go where every state goes: `jax.vmap`, donation, checkpoints, Optax's trees; with
parameters of every dtype.

The oracle is the state itself, and the run that was not moved.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import avals, normals, same
from stored import WIDE, mixed

import adam_jax as aj
from adam_jax import storage

OPTIMIZED = True  # it computes for longer than it compiles
GOES = {"bfloat16": "bfloat16", "8bit": "8bit"}


@pytest.mark.parametrize("how", GOES)
def test_vmap_over_states(how):
    """Each model has the bits it would have alone: they are of its own array."""
    tx = aj.adamw(0.1, storage=how)
    models = jax.tree.map(lambda p: jnp.stack([p, 1e4 * p, -p]), mixed())

    def walk(params):
        def step(carry, i):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda p: p * (1 + i), params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(4.0))[0]

    batched = jax.jit(jax.vmap(walk))(models)
    alone = jax.jit(walk)
    for i in range(3):
        one = alone(jax.tree.map(lambda p, i=i: p[i], models))
        found = jax.tree.map(lambda p, i=i: p[i], batched)
        assert avals(found) == avals(one)
        for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
            # Two compilations differ in a last bit, and so here and there in a rounding.
            close = np.isclose(
                np.asarray(left, np.float64), np.asarray(right, np.float64), rtol=1e-4, atol=1e-6
            )
            assert np.mean(~close) < 0.01


@pytest.mark.parametrize("how", GOES)
def test_donation_device_put_and_tree_map(how):
    tx, params = aj.amsgrad(0.1, storage=how), mixed()
    keeping, giving = jax.jit(tx.update), jax.jit(tx.update, donate_argnums=1)
    state = other = tx.init(params)
    for _ in range(3):
        _, state = keeping(params, state)
        other = jax.tree.map(jnp.copy, jax.device_put(other, jax.devices()[0]))
        given = [leaf for leaf in jax.tree.leaves(other) if jnp.ndim(leaf) == 2 and leaf.size > 4]
        _, other = giving(params, other)
        assert len(given) == 3
        assert all(leaf.is_deleted() for leaf in given)
    same(other, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("how", GOES)
# Orbax of JAX 0.6's time warns that it takes the sharding from the checkpoint, as the template has
# none.
@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring:UserWarning")
def test_a_run_goes_on_from_a_checkpoint(how, tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    tx, params = aj.adam(0.1, storage=how), mixed()
    step = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(3):
        _, state = step(params, state)
    with orbax.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    same(restored, state)
    same(step(params, restored), step(params, state))


@pytest.mark.parametrize("name", ["mu", "nu"])
def test_tree_get_finds_a_resting_moment(name):
    found = optax.tree.get(aj.adam(0.1, storage="8bit").init(mixed()), name)
    assert avals(found)["w"][:2] == ((64, 72), jnp.int8 if name == "mu" else jnp.uint8)


def test_map_params_maps_resting_moments_and_nothing_else():
    tx = aj.adam(0.1, storage="8bit")
    state = tx.init(mixed())
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + jnp.ones((), leaf.dtype), state)
    for (path, leaf), before in zip(
        jax.tree_util.tree_leaves_with_path(mapped), jax.tree.leaves(state), strict=True
    ):
        moment = ".mu" in jax.tree_util.keystr(path) or ".nu" in jax.tree_util.keystr(path)
        np.testing.assert_array_equal(leaf, before + np.asarray(moment, before.dtype))


@pytest.mark.parametrize("how", [*GOES, "float32"])
def test_double_precision_parameters(how, x64):
    params = {
        "w": jnp.ones((64, 72), jnp.float64),
        "v": jnp.ones((64, 72), jnp.float32),
        "b": jnp.ones(7, jnp.float64),
    }
    tx = aj.adam(0.1, storage=how)
    state, step = tx.init(params), jax.jit(tx.update)
    expected = avals(state)
    rests = {
        "bfloat16": [jnp.bfloat16] * 2,
        "8bit": [jnp.int8] * 2,
        "float32": [jnp.float64, jnp.float32],
    }[how]
    assert [state[0].mu[key].dtype for key in "wv"] == rests
    assert state[0].mu["b"].dtype == jnp.float64
    for i in range(4):
        updates, state = step(params, state)
        assert avals(state) == expected
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
        np.testing.assert_allclose(
            np.mean(updates["w"]), -0.1, rtol=1e-7 if i == 0 or how == "float32" else 0.1
        )


def test_a_float32_rest_of_double_precision_is_asked_for_by_its_dtype(x64):
    tx = aj.adam(0.1, mu_dtype=jnp.float32, nu_dtype=jnp.float32)
    params = jnp.ones(3, jnp.float64)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state)
        assert state[0].mu.dtype == state[0].nu.dtype == jnp.float32
        assert updates.dtype == jnp.float64
        np.testing.assert_allclose(updates, np.full(3, -0.1), rtol=1e-5)


@pytest.mark.parametrize("how", GOES)
def test_complex_and_integer_leaves(how):
    """A complex μ stays; its ν is real, and narrow.

    An integer leaf has no moments, and moves no other leaf's bits.
    """
    params = {"c": jax.lax.complex(normals(64, 72), normals(64, 72)), "w": normals(64, 72)}
    grads = params | {"i": np.zeros(3, jax.dtypes.float0)}
    tx = aj.adam(0.1, storage=how)
    state = tx.init(params | {"i": jnp.arange(3)})
    plain = tx.init(params)
    expected = avals(state)
    for _ in range(2):
        updates, state = tx.update(grads, state, params | {"i": jnp.arange(3)})
        _, plain = tx.update(params, plain, params)
        assert avals(state) == expected
    assert state[0].mu["c"].dtype == jnp.complex64
    assert state[0].nu["c"].dtype == (jnp.bfloat16 if how == "bfloat16" else jnp.uint8)
    assert state[0].mu["i"] is None
    np.testing.assert_array_equal(updates["i"], np.zeros(3))
    np.testing.assert_allclose(np.mean(np.abs(updates["c"])), 0.1, rtol=0.1)
    same((state[0].mu["w"], state[0].nu["w"]), (plain[0].mu["w"], plain[0].nu["w"]))


@pytest.mark.parametrize(
    ("how", "dtype"), [("8bit", jnp.bfloat16), ("bfloat16", jnp.float16)], ids=["8bit", "bfloat16"]
)
def test_half_precision_parameters(how, dtype):
    params = normals(WIDE).astype(dtype)
    wide = params.astype(jnp.float32)
    tx = aj.adam(0.1, storage=how)
    state, other, step = tx.init(params), tx.init(wide), jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(params, state)
        exact, other = step(wide, other)
        assert updates.dtype == dtype
        assert np.mean(np.asarray(updates) == np.asarray(exact.astype(dtype))) > 0.99
    assert avals(state) == avals(other)


def test_blocks_share_a_nu_that_rests_narrow_too():
    tx = aj.adam_mini(0.1, storage=storage.Codes(smallest=64))
    params = {"w": normals(8, 64), "v": normals(8, 63)}
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(params, state, params)
    assert {k: (v.shape, v.dtype) for k, v in state[0].nu.items()} == {
        "w": ((1, 64), jnp.uint8),
        "v": ((1, 63), jnp.float32),
    }
    assert all(np.isfinite(u).all() for u in updates.values())
