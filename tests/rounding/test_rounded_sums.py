"""The sum that the caller forms, `params + update`, is exactly the rounded parameter.

The oracle is NumPy's float32, which knows the two numbers of a dtype that enclose a sum.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounded import LINKS, LOW, apply, apply_eagerly, enclosing, f32, finite, nearest, recombined

TINY = np.float32(2.0**-126)


@functools.cache
def flushes():
    """Whether this backend takes subnormal float32 numbers for zero."""
    return bool(jax.jit(lambda x: x + x)(jnp.float32(2.0**-127)) == 0)


def flushed(x):
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x) if flushes() else x


def add(x, y):
    with np.errstate(over="ignore", invalid="ignore"):
        return flushed(flushed(x) + flushed(y))


def some_numbers(dtype):
    """Every exponent with both signs, and mantissas at both ends and between: zeros, subnormals and
    the largest among them.
    """
    digits = int(jnp.finfo(dtype).nmant)
    mantissas = np.unique([0, 1, (1 << digits) - 1] + ([3, 0x155] if digits > 8 else []))
    exponents = np.arange(2 ** (15 - digits) - 1)
    positive = ((exponents[:, None] << digits) + mantissas).ravel()
    return np.concatenate([positive, positive | 0x8000]).astype(np.uint16).view(dtype)


@functools.cache
def pairs(dtype):
    """From each of them to each of them: parameters, targets, updates, and the sum in float32."""
    numbers = some_numbers(dtype)
    params, targets = (
        np.ascontiguousarray(x) for x in np.meshgrid(numbers, numbers, indexing="ij")
    )
    with np.errstate(over="ignore"):
        updates = (targets.astype(float) - params.astype(float)).astype(np.float32)
    return params, f32(targets), updates, add(f32(params), updates)


@functools.cache
def rounded_pairs(dtype, name):
    """What their finite sums may become."""
    new = pairs(dtype)[-1]
    new = new[np.isfinite(new)]
    return enclosing(new, dtype) if name == "stochastic" else (nearest(new, dtype),) * 2


@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_the_sum_is_the_rounded_number_for_all_pairs_of_exponents(dtype, name, how):
    params, targets, updates, new = pairs(dtype)
    tx = LINKS[name]

    def step(
        params, minus
    ):  # the update is made in the same computation, where XLA may simplify what comes of it
        return apply_eagerly(tx, params, tx.init(params), -minus)[0]

    found = (jax.jit(step) if how == "jit" else step)(jnp.asarray(params), jnp.asarray(-updates))
    assert found.dtype == dtype
    found, old, ok = f32(found), flushed(f32(params)), np.isfinite(new)

    assert (
        found[~ok] == new[~ok]
    ).all()  # the update is not finite either: the two were too far apart
    found, old, targets, new = found[ok], old[ok], targets[ok], new[ok]
    candidates = rounded_pairs(dtype, name)
    # A difference that is subnormal is lost where those are zero: with any other optimizer, too.
    vanishing = np.any([(np.abs(r - old) < TINY) & (r != old) & flushes() for r in candidates], 0)
    exact = (found == candidates[0]) | (found == candidates[1])
    assert exact[~vanishing].all()
    assert (exact | (found == old)).all()
    assert vanishing.mean() < 1e-3

    there = (new == targets) & ~vanishing
    assert (found == targets)[there].all()
    assert there.mean() > 0.5
    assert (np.abs(targets[there]) < 2.0**-16 * np.abs(old[there])).any() or dtype == jnp.float16
    assert (np.abs(old[there]) < 2.0**-16 * np.abs(targets[there])).any()


def test_a_number_is_rounded_to_either_neighbour_and_past_the_largest_to_it():
    """Sums that are in no way special, but for the last, which no bfloat16 reaches."""
    draw = np.random.default_rng(0)
    old = jnp.asarray(
        draw.standard_normal(20_000) * 2.0 ** draw.integers(-40, 40, 20_000), jnp.bfloat16
    )
    update = (
        f32(old) * draw.standard_normal(20_000) * 2.0 ** draw.integers(-12, 4, 20_000)
    ).astype(np.float32)
    old, update = (
        old.at[:4].set(jnp.asarray([3e38, -3e38, 3.3e38, -3.3e38], old.dtype)),
        update.copy(),
    )
    update[:4] = np.float32([3.95e37, -3.95e37, 1e37, -1e37])
    new = f32(old) + update
    below, above = enclosing(new, jnp.bfloat16)
    stochastic, near = (
        f32(apply(tx, old, tx.init(old), jnp.asarray(update))[0]) for tx in LINKS.values()
    )
    assert ((stochastic == below) | (stochastic == above)).all()
    np.testing.assert_array_equal(near, nearest(new, jnp.bfloat16))
    assert 0.4 < np.mean((stochastic == above)[below < above]) < 0.6
    np.testing.assert_array_equal(np.abs(stochastic[:4]), finite(jnp.bfloat16)[-1])


def test_where_a_compensated_parameter_falls_to_next_to_nothing_the_sum_is_off_by_next_to_nothing():
    """Its lost bits reach to 2⁻²⁴ of it, and so may what is left; a difference that is larger than
    it does not.
    """
    draw = np.random.default_rng(0)
    old = jnp.asarray(
        draw.choice([-1, 1], 4096) * (1 + draw.integers(0, 128, 4096) / 128), jnp.bfloat16
    )
    lost = jnp.asarray(draw.integers(-(2**15), 2**15, 4096), jnp.int16)
    before = recombined(old, lost)
    left = (draw.integers(-600, 600, 4096) * 2.0**-24).astype(np.float32)
    update = left - before
    new = before + update
    tx = LINKS["compensate"]
    found, _ = apply(tx, old, tx.init(old)._replace(lost=lost), jnp.asarray(update))
    assert (
        np.abs(f32(found).astype(float) - nearest(new, jnp.bfloat16)) <= 2.0**-24 * np.abs(f32(old))
    ).all()
    assert (np.abs(new) < 2.0**-16).mean() > 0.3


def test_a_finite_sum_stays_finite_where_the_difference_overflows(link):
    old = jnp.full(16, 3e38, jnp.bfloat16)
    found, _ = apply(link, old, link.init(old), jnp.full(16, -3.4028e38, jnp.float32))
    assert np.isfinite(f32(found)).all()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 1, 3)], ids=str)
def test_every_shape(link, shape):
    old = jnp.ones(shape, jnp.bfloat16)
    found, _ = apply(link, old, link.init(old), jnp.full(shape, 0.5))
    np.testing.assert_array_equal(f32(found), np.full(shape, 1.5, np.float32))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("of", ["update", "parameter"])
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_what_is_not_finite_stays_to_be_seen(link, bad, of, dtype):
    old, update = (
        jnp.asarray([1.0, -1.0, 0.0, 6e4], dtype),
        jnp.asarray([1e-3, 1.0, 0.0, -1.0], jnp.float32),
    )
    expected = f32(old)
    if of == "update":
        update = update.at[:3].set(bad)
    else:
        old = old.at[:3].set(bad)
    tx, state = link, link.init(old)
    found, state = apply(tx, old, state, update)
    np.testing.assert_array_equal(f32(found)[:3], np.full(3, bad, np.float32))
    assert np.isfinite(f32(found)[3])
    found, _ = apply(tx, found, state, jnp.zeros(4))
    assert not np.isfinite(f32(found)[:3]).any()
    np.testing.assert_allclose(f32(found)[3], expected[3] - 1, rtol=2.0**-7)


def test_a_sum_beyond_float32_is_infinite_and_one_beyond_bfloat16_is_the_largest(link):
    old, update = (
        jnp.asarray([3.3e38, 3.3e38, -3.3e38], jnp.bfloat16),
        jnp.asarray([3e38, 1e37, -1e37], jnp.float32),
    )
    found, _ = apply(link, old, link.init(old), update)
    top = finite(jnp.bfloat16)[-1]
    np.testing.assert_array_equal(f32(found), np.float32([np.inf, top, -top]))
