"""Stochastic rounding is right on average, and its draws depend on seed, step, leaf and position
alone.

The oracle is a fair coin of the right weight.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from rounded import LINKS, LOW, apply, enclosing, f32

import adam_jax as aj


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_the_mean_over_many_draws_is_the_sum(dtype):
    """10⁵ draws a number, over positions and steps: up as often as a fair coin of that weight,
    within 4 standard errors.
    """
    olds = np.array(
        [1.0, -1.0, 0.75, -3.0, 0.0, 0.0, 1e4, *[2.0**-20, -(2.0**-16)] * (dtype == jnp.float16)]
    )
    moves = np.array(
        [1e-3, 1e-3, -1e-5, 1e-2, 1e-6, -3e-5, 1.0, *[1.3e-8, 0.7e-8] * (dtype == jnp.float16)]
    )
    tx = LINKS["stochastic"]
    old = jnp.asarray(np.repeat(olds[:, None], 2500, 1), dtype)
    update = jnp.asarray(np.repeat(moves[:, None], 2500, 1), jnp.float32)

    def step(state, _):
        new, state = apply(tx, old, state, update)
        return state, new

    drawn = f32(jax.jit(lambda: lax.scan(step, tx.init(old), None, length=40)[1])())
    new = f32(old[:, 0]) + f32(update[:, 0])
    below, above = (x.astype(float) for x in enclosing(new, dtype))
    assert (above > below).all()
    assert ((drawn == above[:, None]) | (drawn == below[:, None])).all()
    share = (new - below) / (above - below)
    ups = (drawn == above[:, None]).mean((0, 2))
    error = np.sqrt(share * (1 - share) / 100_000)
    assert (np.abs(ups - share) <= 4 * error).all(), (ups, share, error)


def test_the_draws_depend_on_seed_step_leaf_and_position_and_on_nothing_else():
    shape = (300, 100)
    params = {
        "a": jnp.ones(shape, jnp.bfloat16),
        "wide": jnp.ones(shape),
        "b": jnp.ones(shape, jnp.bfloat16),
    }
    updates = jax.tree.map(
        lambda p: jnp.full(p.shape, 2.0**-8, jnp.float32), params
    )  # an even coin

    def ups(seed, step, leaf="a"):
        tx = aj.round_stochastically(seed)
        state = tx.init(params)._replace(step=jnp.int32(step))
        return f32(jax.jit(tx.update)(updates, state, params)[0][leaf]) > 0

    coin = ups(0, 0)
    np.testing.assert_array_equal(coin, ups(0, 0))
    np.testing.assert_array_equal(coin, ups(np.int64(0), 0))
    others = [ups(1, 0), ups(2**32 - 1, 0), ups(0, 1), ups(0, 2**31 - 1), ups(0, 0, "b")]
    others += [
        np.roll(coin, 1, 0),
        np.roll(coin, 1, 1),
        np.roll(coin, 64, 1),
        coin[::-1],
        ups(1, 1),
    ]
    for other in others:
        assert abs(np.mean(coin == other) - 0.5) < 4 * 0.5 / np.sqrt(coin.size)
    for axis in (0, 1):  # no row and no column is one-sided
        means = coin.mean(axis)
        assert (np.abs(means - 0.5) < 5 * 0.5 / np.sqrt(shape[axis])).all()


def test_the_seed_is_a_hyperparameter_to_inject(standard_promotion):
    old, step = jnp.ones(512, jnp.bfloat16), jnp.full(512, 1e-3)
    tx = optax.inject_hyperparams(aj.round_stochastically)(seed=7)
    found = tx.update(step, tx.init(old), old)[0]
    np.testing.assert_array_equal(
        found, aj.round_stochastically(7).update(step, aj.round_stochastically().init(old), old)[0]
    )
