"""Every optimizer trains with stored moments as with float32 moments, under Optax's wrappers too.

The oracle is the same run with float32 moments.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUICKLY, avals, normals
from stored import mixed

import adam_jax as aj

OPTIMIZED = True  # it computes for longer than it compiles


def target(params, batch):
    return (
        jnp.mean((params["w"] - batch["w"]) ** 2) * 20
        + jnp.mean((params["b"] - batch["b"]) ** 2) * 3
    )


BATCHES = {"w": normals(50, 64, 72, seed=3) * 0.3 + 1, "b": normals(50, 7, seed=4) * 0.3 - 1}


@functools.cache
def trained(how):
    """Of each member -> (parameters, state, updates of the first step) after 50 jitted, scanned
    steps: one program for all.
    """
    txs = {name: getattr(aj, name)(0.01, storage=how) for name in aj.family.__all__}

    def run(tx):
        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(jax.grad(target)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), updates

        carry, updates = jax.lax.scan(step, (mixed(), tx.init(mixed())), BATCHES)
        return *carry, jax.tree.map(lambda u: u[0], updates)

    return jax.jit(lambda: {name: run(tx) for name, tx in txs.items()}).lower().compile(QUICKLY)()


@pytest.mark.parametrize("how", ["bfloat16", "8bit"])
@pytest.mark.parametrize("member", aj.family.__all__)
def test_every_member_trains_as_with_float32_moments(member, how, agree):
    start = mixed()
    wide, narrow = (trained(its)[member] for its in ("float32", how))
    # Yogi's ν begins with a number that has to be narrowed itself.
    agree(narrow[2], wide[2], rtol=1e-6 if member != "yogi" else 0.05)
    for name, limit in (("w", 0.1 if how == "bfloat16" else 0.3), ("b", 1e-4)):
        moved = np.asarray(wide[0][name] - start[name])
        error = np.asarray(narrow[0][name] - wide[0][name])
        assert np.sqrt(np.mean(moved**2)) > 0.01
        assert np.sqrt(np.mean(error**2)) < limit * np.sqrt(np.mean(moved**2))
        assert abs(error.mean()) < 0.05 * np.abs(moved).mean()
    tx = getattr(aj, member)(0.01, storage=how)
    assert avals(narrow[1]) == avals(tx.init(start)) == avals(jax.eval_shape(tx.init, start))
    moments = {
        jax.tree_util.keystr(path): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(narrow[1])
        if jnp.shape(leaf) == (64, 72)
    }
    assert len(moments) == moments_of(member)
    for path, dtype in moments.items():
        codes = jnp.int8 if ".mu" in path else jnp.uint8
        assert dtype == (jnp.bfloat16 if how == "bfloat16" else codes), path


def moments_of(member):
    return {"momentum": 1, "rmsprop": 1, "adam_mini": 1, "amsgrad": 3, "ademamix": 3}.get(member, 2)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5)),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"in": tx, "out": optax.sgd(0.01)}, {"w": "in", "b": "out"}
    ),
    "multi_transform": lambda tx: optax.multi_transform(
        {0: tx, 1: optax.chain(tx, optax.scale(0.5))}, {"w": 0, "b": 1}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
}


@pytest.mark.parametrize("name", WRAPPERS)
# Optax before 0.2.6 warns of itself, under a JAX of its time.
@pytest.mark.filterwarnings("ignore:unzip2 was deprecated:DeprecationWarning")
def test_under_optax_wrappers(name, train, standard_promotion):
    batches = jax.tree.map(lambda b: b[:20], BATCHES)
    both = (
        WRAPPERS[name](aj.adamw(0.01, storage=how)) for how in ("float32", ("bfloat16", "8bit"))
    )
    wide, narrow = (train(tx, mixed(), batches, target) for tx in both)
    moved = np.asarray(wide[0]["w"] - mixed()["w"])
    error = np.asarray(narrow[0]["w"] - wide[0]["w"])
    assert 0 < np.sqrt(np.mean(error**2)) < 0.2 * np.sqrt(np.mean(moved**2))
    np.testing.assert_allclose(narrow[0]["b"], wide[0]["b"], rtol=1e-4)
    assert [
        leaf.dtype
        for leaf in jax.tree.leaves(narrow[1])
        if jnp.ndim(leaf) == 2 and leaf.dtype.itemsize < 4
    ][:2] == [
        jnp.bfloat16,
        jnp.uint8,
    ]


def test_inject_hyperparams(train, standard_promotion):
    how = ("bfloat16", "8bit")
    batches = jax.tree.map(lambda b: b[:20], BATCHES)
    tx = optax.inject_hyperparams(aj.adam, static_args=("storage",))(
        optax.constant_schedule(0.01), storage=how
    )
    found, state = train(tx, mixed(), batches, target)
    plain = train(aj.adam(0.01, storage=how), mixed(), batches, target)[0]
    assert (state.inner_state[0].mu["w"].dtype, state.inner_state[0].nu["w"].dtype) == (
        jnp.bfloat16,
        jnp.uint8,
    )
    for name in ("w", "b"):
        assert np.mean(~np.isclose(found[name], plain[name], rtol=1e-4, atol=1e-6)) < 0.01
