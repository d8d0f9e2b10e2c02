"""Parameters behind `compensate`, with the bits that they lost, are those of a float32 run.

The oracle is the float32 run itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rounded import LINKS, LOW, apply, bits, f32, nearest, recombined

import adam_jax as aj


def compensated_run(dtype, params, updates):
    """Parameters and lost bits after every step, and the float32 run."""
    tx = LINKS["compensate"]

    def low(carry, update):
        carry = apply(tx, *carry, update)
        return carry, carry

    def high(carry, update):
        return carry + update, carry + update

    params = jnp.asarray(params, dtype)
    _, (found, state) = jax.jit(lambda u: lax.scan(low, (params, tx.init(params)), u))(updates)
    _, expected = jax.jit(lambda u: lax.scan(high, params.astype(jnp.float32), u))(updates)
    return found, state.lost, f32(expected)


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_parameters_with_their_lost_bits_are_the_float32_run(dtype):
    """Bit for bit over 400 steps, of all sizes for bfloat16; for float16 of those that it holds as
    normal numbers.
    """
    draw = np.random.default_rng(0)
    if dtype == jnp.bfloat16:
        params = draw.standard_normal(1024) * 2.0 ** draw.integers(-40, 40, 1024)
        updates = (
            draw.standard_normal((400, 1024))
            * np.abs(params)
            * 2.0 ** draw.integers(-26, 1, (400, 1024))
        )
    else:
        params = draw.choice([-1, 1], 1024) * 2.0 ** draw.uniform(-6, 12, 1024)
        updates = (
            draw.standard_normal((400, 1024))
            * np.abs(params)
            * 2.0 ** draw.integers(-26, -8, (400, 1024))
        )
    updates = updates.astype(np.float32)
    found, lost, expected = compensated_run(dtype, params, updates)
    assert lost.dtype == jnp.int16
    assert lost.shape == expected.shape
    np.testing.assert_array_equal(bits(recombined(found, lost)), bits(expected))
    np.testing.assert_array_equal(f32(found), nearest(expected, dtype))
    assert (f32(found) != expected).mean() > 0.99
    assert (np.diff(np.sign(expected), axis=0) != 0).any() == (dtype == jnp.bfloat16)


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_the_lost_bits_never_make_it_worse(dtype):
    """Where there are too many of them they saturate: subnormal float16 numbers, and beyond the
    largest number.
    """
    draw = np.random.default_rng(0)
    update = draw.standard_normal(4096) * 2.0 ** draw.integers(-30, -14, 4096)
    top = float(jnp.finfo(dtype).max)
    update[:64] = np.linspace(0.999, 1.0019 if dtype == jnp.bfloat16 else 1.5, 64) * top
    update[64:128] = -update[:64]
    update = update.astype(np.float32)
    found, lost, expected = compensated_run(dtype, np.zeros(4096), update[None])
    alone, together = np.abs(f32(found) - expected), np.abs(recombined(found, lost) - expected)
    assert (together <= alone).all()
    assert (together < alone).mean() > 0.5
    if dtype == jnp.bfloat16:
        assert (together[:, 128:] == 0).all()


def test_what_is_lost_is_kept_only_for_narrow_leaves():
    params = {
        "low": jnp.ones((3, 2), jnp.bfloat16),
        "half": jnp.ones(2, jnp.float16),
        "wide": jnp.ones(2),
        "i": jnp.arange(3),
        "z": jnp.ones(2, jnp.complex64),
        "none": None,
    }
    tx = LINKS["compensate"]
    state = tx.init(params)
    for _ in range(2):
        assert jax.tree.map(lambda x: (x.shape, x.dtype.name), state.lost) == {
            "low": ((3, 2), "int16"),
            "half": ((2,), "int16"),
            **dict.fromkeys(["wide", "i", "z", "none"]),
        }
        _, state = jax.jit(tx.update)(params, state, params)
    assert jax.tree.leaves(LINKS["stochastic"].init(params)) == [0]


def test_a_hundred_small_updates():
    """The design's example: each is a quarter of 1.0's last bit downwards, and rounded to nearest
    none of them is seen.
    """
    old = jnp.ones(4096, jnp.bfloat16)
    grads = jnp.ones((100, 4096), jnp.bfloat16)

    def run(*links):
        tx = aj.chain(aj.scale_by_learning_rate(1e-3), *links)
        return jax.jit(
            lambda: lax.scan(
                lambda carry, g: (apply(tx, *carry, g), None), (old, tx.init(old)), grads
            )[0]
        )()

    assert (f32(run()[0]) == 1).all()
    expected = np.float32(1)
    for _ in range(100):
        expected -= np.float32(1e-3)
    compensated, (_, state) = run(LINKS["compensate"])
    np.testing.assert_array_equal(recombined(compensated, state.lost), expected)
    np.testing.assert_array_equal(f32(compensated), nearest(expected, jnp.bfloat16))
    stochastic = f32(run(LINKS["stochastic"])[0])
    # A step's variance is below (last bit)²/4, and there are a hundred.
    assert abs(stochastic.mean() - 0.9) < 4 * np.sqrt(100 / 4 * 2.0**-16 / stochastic.size)
    assert stochastic.std() > 2.0**-8
