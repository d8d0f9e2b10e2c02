"""Every optimizer with bfloat16 parameters and 8-bit moments stays close to its float32 run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICKLY
from jax import lax
from rounded import LINKS, apply, f32

import adam_jax as aj


@functools.cache
def both_runs():
    """Of each member the parameters after 30 steps in four bytes and in float32, in one program;
    start, and the way down.
    """
    draw = np.random.default_rng(0)
    shape = (64, 64)
    way = np.where(np.arange(64) % 3 == 0, -1, 1)  # most gradients of a column agree
    grads = jnp.asarray((0.5 + np.abs(draw.standard_normal((30, *shape)))) * way, jnp.bfloat16)
    start = jnp.asarray(draw.choice([-1, 1], shape) * draw.uniform(1, 2, shape), jnp.bfloat16)

    def run(member):
        low, high = aj.chain(member(5e-4, storage="8bit"), LINKS["stochastic"]), member(5e-4)

        def step(carry, g):
            return (apply(low, *carry[0], g), apply(high, *carry[1], g.astype(jnp.float32))), None

        wide = start.astype(jnp.float32)
        (found, _), (expected, _) = lax.scan(
            step, ((start, low.init(start)), (wide, high.init(wide))), grads
        )[0]
        return found, expected

    made = (
        jax.jit(lambda: {name: run(getattr(aj, name)) for name in aj.family.__all__})
        .lower()
        .compile(QUICKLY)()
    )
    return made, start, way


@pytest.mark.parametrize("member", aj.family.__all__)
def test_every_member_stays_close_to_its_float32_run(member):
    """bfloat16 parameters, 8-bit moments, 30 steps, each below half of most
    parameters' last bit.
    """
    made, start, way = both_runs()
    found, expected = made[member]
    assert found.dtype == jnp.bfloat16
    moved, should = ((f32(x) - f32(start)) * way for x in (found, expected))
    noise = np.std(moved - should) / np.sqrt(moved.size)
    assert should.mean() < -10 * noise
    np.testing.assert_allclose(moved.mean(), should.mean(), rtol=0.02, atol=4 * noise)
    assert (
        np.abs(moved - should).max() < 6 * np.sqrt(30 / 4) * 2.0**-7
    )  # a walk of 30 steps, each with half a last bit's noise
