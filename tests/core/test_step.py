"""`tx.step`: the update is added in float32, and the sum rounded once.

The oracle for parameters in 16 bits is the same transformation on the same numbers in float32, and
one rounding by NumPy. For all others it is `update` and `apply_updates`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import draw_tree, refused, same

import adam_jax as aj

HALF = jnp.bfloat16
START = draw_tree(0, {"a": (4, 8), "b": {"w": (16, 16), "v": (5,)}})
STEPS = 3
CODES = aj.storage.Codes(smallest=0)

KINDS = {
    "adam": aj.adam(0.1),
    "adamw": aj.adamw(0.1, weight_decay=0.1, mask="matrices"),
    "8bit": aj.adam(0.1, storage=CODES),
    "lamb": aj.lamb(0.01, weight_decay=0.1),
    "rate alone": aj.scale_by_learning_rate(0.1),
    "optax first": aj.chain(optax.clip(0.5), aj.adamw(0.1)),
    "optax last": aj.chain(aj.adamw(0.1), optax.scale(0.7)),
    "groups": aj.by_path({"b/w": {"learning_rate_multiplier": 0.3}, "a": "frozen"}, aj.adam(0.1)),
    "skip": aj.skip_nonfinite(aj.adamw(0.1)),
    "spikes": aj.skip_spikes(aj.adam(0.1)),
    "observe": aj.observe(aj.adam(0.1), every=2),
    "axes": aj.manual_axes(aj.adam(0.1), shared="x"),
    "average": aj.chain(aj.adam(0.1), aj.stages.average_parameters(0.9)),
}
ROUNDING = {
    "round_stochastically": aj.chain(aj.adamw(0.1, storage=CODES), aj.round_stochastically()),
    "compensate": aj.skip_nonfinite(aj.chain(aj.adamw(0.1), aj.compensate())),
    "groups": aj.by_path(
        {"a": aj.chain(aj.adam(0.1), aj.compensate())},
        aj.chain(aj.adam(0.1), aj.round_stochastically()),
    ),
}


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def gradients(t, dtype):
    return cast(jax.tree.map(lambda x: jnp.cos(t + 5 * x), START), dtype)


def old_way(tx):
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return aj.apply_updates(params, updates), state

    return step


def run(step, tx, dtype=HALF):
    params = cast(START, dtype)
    state = tx.init(params)
    for t in range(STEPS):
        params, state = step(gradients(t, dtype), state, params)
    return params, state


@pytest.fixture(scope="module", autouse=True)
def standard():
    with jax.numpy_dtype_promotion("standard"):  # Optax's stages need it
        yield


@pytest.mark.parametrize("name", KINDS)
def test_sums_of_half_precision_are_rounded_once(name):
    tx = KINDS[name]
    params, wide = cast(START, HALF), cast(cast(START, HALF), jnp.float32)
    state, wide_state = tx.init(params), tx.init(wide)
    if name == "average":  # which keeps the sums
        wide_state = state
    for t in range(STEPS):
        grads = gradients(t, HALF)
        updates, wide_state = tx.update(cast(grads, jnp.float32), wide_state, wide)
        expected = jax.tree.map(lambda p, u: np.asarray(p + u).astype(HALF), wide, updates)
        params, state = tx.step(grads, state, params)
        assert jax.tree.all(jax.tree.map(lambda x: x.dtype == HALF, params))
        same(params, expected)
        wide = cast(params, jnp.float32)


def test_update_and_apply_updates_round_twice():
    once, twice = (
        run(step, KINDS["adam"])[0] for step in (KINDS["adam"].step, old_way(KINDS["adam"]))
    )
    assert not jax.tree.all(jax.tree.map(np.array_equal, once, twice))


@pytest.mark.parametrize("name", KINDS)
def test_in_float32_it_is_update_and_apply_updates(name):
    tx = KINDS[name]
    same(run(tx.step, tx, jnp.float32), run(old_way(tx), tx, jnp.float32))


@pytest.mark.parametrize("name", ROUNDING)
def test_behind_a_stage_that_rounds_it_is_update_and_apply_updates(name):
    tx = ROUNDING[name]
    same(run(tx.step, tx), run(old_way(tx), tx))


def both(way, tx):
    """What a way of calling makes of `step`, and of `update` and `apply_updates`, in float32."""
    return way(tx.step), way(old_way(tx))


def test_jitted_with_donation_scanned_and_mapped():
    tx = ROUNDING["round_stochastically"]
    params = cast(START, HALF)

    def donated(step):
        mine = jax.tree.map(jnp.copy, params)
        jitted = jax.jit(step, donate_argnums=(1, 2))
        made = jitted(gradients(0, HALF), tx.init(mine), mine)
        assert mine["b"]["w"].is_deleted()
        return made

    def scanned(step):
        body = lambda carry, t: (step(gradients(t, HALF), carry[1], carry[0]), None)
        return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(3.0))[0]

    def mapped(step):
        many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
        return jax.vmap(step)(many, jax.vmap(tx.init)(many), many)

    for way in (donated, scanned, jax.jit(mapped, static_argnums=0)):
        same(*both(way, tx))


def test_it_has_the_derivative_of_the_update():
    tx = KINDS["adamw"]

    def loss(scale, step):
        grads = jax.tree.map(lambda g: scale * g, gradients(0, jnp.float32))
        params, _ = step(grads, tx.init(START), START)
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params))

    way = lambda step: jax.grad(loss)(0.5, step)
    one, other = both(way, tx)
    np.testing.assert_allclose(one, other, rtol=1e-6)
    difference = (loss(0.51, tx.step) - loss(0.49, tx.step)) / 0.02
    np.testing.assert_allclose(one, difference, rtol=0.1, atol=1e-3)


def test_inside_shard_map():
    tx = aj.manual_axes(aj.skip_nonfinite(aj.adam(0.1)), shared="x")
    mesh, spec = jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec()
    shard_map = getattr(jax, "shard_map", None) or jax.experimental.shard_map.shard_map
    way = lambda step: shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec)(
        gradients(0, jnp.float32), tx.init(START), START
    )
    same(*both(jax.jit(way, static_argnums=0), tx))


def test_what_has_no_update_stays():
    """Integers, and in a module functions."""
    mlp = eqx.nn.MLP(2, 2, 8, 1, key=jax.random.key(0))
    model = {"net": mlp, "count": jnp.arange(3)}
    arrays = eqx.filter(model, eqx.is_inexact_array)
    tx = aj.adamw(0.1)
    moved, _ = tx.step(arrays, tx.init(model), model)
    same(moved["count"], model["count"])
    assert moved["net"].activation is mlp.activation
    expected, _ = tx.step(arrays, tx.init(arrays), arrays)
    same(eqx.filter(moved, eqx.is_inexact_array), expected)


def test_it_is_refused_without_parameters_and_for_a_part():
    tx = aj.adam(0.1)
    with refused(ValueError, "adam: step: found no parameters"):
        tx.step(START, tx.init(START), None)
    part = aj.track_moments()
    with refused(ValueError, "track_moments: step: found stages that give Moments"):
        part.step(START, part.init(START), START)
