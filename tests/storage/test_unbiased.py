"""Narrowing to codes and to floats of few bits is right on average, and keeps what they have.

The oracle is the expectation, in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrowing import FLOATS, GRIDS, as_float, grid, narrowed, table

from adam_jax.storage.codec import to_float
from adam_jax.storage.random_bits import random_bits

OPTIMIZED = True  # it computes for longer than it compiles

DRAWS = 100_000
FRACTIONS = np.array([0.07, 0.5, 0.9])


def between(lower, upper):
    """Float32 numbers between neighbours, and how far up each is: three for every pair."""
    lower, upper = np.repeat(lower, 3), np.repeat(upper, 3)
    x = (lower + np.tile(FRACTIONS, len(lower) // 3) * (upper - lower)).astype(np.float32)
    return x, (x.astype(np.float64) - lower) / (upper - lower)


def some(count, limit=24):
    """Indices of 0 … count − 1, dense at both ends."""
    ends = np.unique(
        np.concatenate([np.arange(12), np.geomspace(1, count, limit - 12).astype(int)])
    )
    return np.unique(np.concatenate([ends[ends < count], count - 1 - np.arange(4)]))


def within_four_standard_errors(share, expected):
    error = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(share - expected) <= 4 * error + 1e-12).all(), np.max(
        np.abs(share - expected) / error
    )


@pytest.mark.parametrize(("codec", "unit"), GRIDS)
def test_codes_are_unbiased(codec, unit):
    """In fine and coarse octaves, below one unit, and where no unit is known yet.

    Below its first code ν is not: see below.
    """
    size = table(codec, unit)
    usable = np.flatnonzero(size[:-1] >= 2.0**-122)
    chosen = usable[some(len(usable))]
    if codec.signed:
        chosen = np.concatenate([[0], chosen])
    x, expected = between(size[chosen], size[chosen + 1])
    lower = np.repeat(chosen, 3)
    sign = np.where(np.arange(len(x)) % 2, -1, 1) if codec.signed else np.ones(len(x), int)

    @jax.jit
    def draw(x):
        return codec.narrow(
            jnp.broadcast_to(x, (DRAWS, len(x))),
            jnp.full((1, 1), unit, jnp.int32),
            random_bits(np.uint32([1, 1]), (DRAWS, len(x))),
        )

    up = np.asarray(draw((x * sign).astype(np.float32))).astype(np.int32) * sign - lower
    assert up.min() == 0
    assert up.max() == 1
    within_four_standard_errors(up.mean(0), expected)
    nearest = narrowed(codec, x, unit)
    clear = FRACTIONS[np.arange(len(x)) % 3] != 0.5
    np.testing.assert_array_equal(nearest[clear], (lower + (expected > 0.5))[clear])


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_unbiased(name):
    dtype = jnp.dtype(name)
    values = grid(dtype)
    lower = some(len(values) - 1)
    if name == "bfloat16":
        lower = lower[lower > 0]
    x, expected = between(values[lower], values[lower + 1])
    sign = np.where(np.arange(len(x)) % 2, -1, 1)

    @jax.jit
    def draw(x):
        random = random_bits(np.uint32([1, 1]), (DRAWS, len(x)))
        return to_float(jnp.broadcast_to(x, random.shape), dtype, random).astype(jnp.float32)

    found = np.asarray(draw((x * sign).astype(np.float32)), np.float64) * sign
    low, high = np.repeat(values[lower], 3), np.repeat(values[lower + 1], 3)
    assert ((found == low) | (found == high)).all()
    within_four_standard_errors((found == high).mean(0), expected)
    nearest = as_float(dtype, x)
    clear = FRACTIONS[np.arange(len(x)) % 3] != 0.5
    np.testing.assert_array_equal(nearest[clear], np.where(expected > 0.5, high, low)[clear])


@pytest.mark.parametrize("random", [0, 0x9E3779B9, 2**32 - 1], ids=hex)
@pytest.mark.parametrize("name", FLOATS)
def test_floats_keep_what_they_have_saturate_and_stay_nan(name, random):
    dtype = jnp.dtype(name)
    values = grid(dtype)
    x = np.concatenate([values, -values])
    np.testing.assert_array_equal(as_float(dtype, x, random), x)
    largest = values[-1]
    beyond = [np.inf, 3.3e38 if name != "bfloat16" else 3.395e38, -np.inf, np.nan]
    np.testing.assert_array_equal(
        as_float(dtype, beyond, random), [largest, largest, -largest, np.nan]
    )
    nans = np.array(
        [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32
    )  # the random bits carry out of these
    assert np.isnan(as_float(dtype, nans.view(np.float32), random)).all()
