"""`by_path` in chains and wrappers, behind and in front of stages that look at all leaves.

The oracles are the same steps written out, and the compiled program's memory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grouped import BIAS, PARAMS, adam, named, only, run, tree
from helpers import refused, same

import adam_jax as aj
from adam_jax import by_path


@pytest.mark.parametrize("guarded", [aj.skip_nonfinite, aj.chain], ids=["guard", "chain"])
def test_a_rate_that_cannot_be_seen_may_be_there(guarded):
    """Of Optax, inside of what is ours, and behind it a link that needs to know."""
    tx = by_path({BIAS: guarded(optax.sgd(0.1))}, adam)
    found, _ = run(tx, PARAMS, tree(1), steps=1, jit=jax.jit)
    same(
        only(BIAS, found),
        run(optax.sgd(0.1), only(BIAS, PARAMS), only(BIAS, tree(1)), steps=1, jit=jax.jit)[0],
    )
    sure, guess = (
        aj.chain(tx, aj.stages.cautious()),
        aj.chain(guarded(optax.sgd(0.1)), aj.stages.cautious()),
    )
    found, _ = run(sure, PARAMS, tree(1), steps=1, jit=jax.jit)
    np.testing.assert_allclose(
        named(found)["encoder/layer_0/bias"],
        (PARAMS["encoder"]["layer_0"]["bias"] - 0.1 * tree(1)["encoder"]["layer_0"]["bias"]),
        rtol=1e-6,
    )
    with refused(ValueError, "cautious() does not know whether the learning rate"):
        run(guess, PARAMS, tree(1))
    with refused(ValueError, "clip_update_rms() does not know the one learning rate"):
        run(aj.chain(tx, aj.stages.clip_update_rms()), PARAMS, tree(1))


def test_between_links(standard_promotion):
    """Clipped by the norm of all gradients; rounded and averaged as one."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = aj.chain(
        optax.clip_by_global_norm(1.0),
        by_path({BIAS: {"learning_rate": 0.05}, "embed/.*": "frozen"}, aj.adam(0.1)),
        aj.round_stochastically(),
        aj.stages.average_parameters(0.9),
    )
    found, state = run(tx, half, half, steps=2, jit=jax.jit)
    same(found["embed"], half["embed"])
    np.testing.assert_array_equal(
        aj.stages.averaged_parameters(state)["embed"]["table"], half["embed"]["table"]
    )
    norm = np.sqrt(sum(float(jnp.sum(p.astype(jnp.float32) ** 2)) for p in jax.tree.leaves(half)))
    mu = state[1].inner_states[BIAS][0].mu["encoder"]["layer_0"]["bias"]
    g = half["encoder"]["layer_0"]["bias"].astype(jnp.float32)
    np.testing.assert_allclose(mu, (0.09 + 0.1 * 1) * g / norm, rtol=2e-2)


def test_clip_update_rms_behind_several_rates_is_refused():
    several = by_path({BIAS: {"weight_decay": 0.0}}, aj.adamw(0.1))
    with refused(
        ValueError,
        "clip_update_rms() does not know",
        "groups with rates of their own",
        "Put it before",
    ):
        run(aj.chain(several, aj.stages.clip_update_rms()), PARAMS, tree(1))
    one = by_path({BIAS: "frozen"}, aj.momentum(0.1))
    found, _ = run(
        aj.chain(one, aj.stages.clip_update_rms(0.5)),
        {"a": {"bias": jnp.ones(2), "w": jnp.ones(2)}},
        {"a": {"bias": jnp.ones(2), "w": jnp.full(2, 4.0)}},
        steps=1,
    )
    np.testing.assert_allclose(found["a"]["w"], 1 - 0.1 * 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "groups",
    [{BIAS: {"learning_rate": 0.2}}, {BIAS: optax.sgd(0.1, 0.9), "head/.*": "frozen"}],
    ids=["ours", "optax"],
)
def test_a_skipped_step_changes_no_bit(groups):
    tx = aj.skip_nonfinite(by_path(groups, aj.adamw(0.1)))
    params, state = run(tx, PARAMS, tree(1), steps=2)
    poison = jax.tree.map(lambda g: g.at[0].set(jnp.nan), tree(2))
    updates, after = jax.jit(tx.update)(poison, state, params)
    same(optax.apply_updates(params, updates), params)
    same(after.inner_state, state.inner_state)
    assert after.skipped == 1


def test_a_donated_step_copies_nothing():
    params = tree(0, {"a": {"bias": (512,), "w": (256, 512)}, "b": {"w": (256, 512)}})
    tx = by_path(
        {BIAS: {"weight_decay": 0.0}, "b/.*": {"learning_rate_multiplier": 0.5}}, aj.adamw(0.1)
    )

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 512
    assert memory.alias_size_in_bytes >= 3 * aj.state_bytes(tx, params).parameters
