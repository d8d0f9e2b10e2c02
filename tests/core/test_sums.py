"""Sums without rounding: right to their last bit, the same in any order, and as careful at the
edges as the rest.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adam_jax._core.sums import mean, norm

SHAPES = [(), (1,), (7,), (1000,), (33, 5), (4, 3, 50), (100_000,)]


def numbers(shape, spread, seed=0):
    return np.random.default_rng(seed).lognormal(0, spread, shape).astype(np.float32)


def some_axes(x):
    return [axes for n in range(1, x.ndim) for axes in itertools.combinations(range(x.ndim), n)]


@jax.jit
def sums(x):
    return mean(x), norm(-x), [mean(x, axes) for axes in some_axes(x)]


@pytest.mark.parametrize("spread", [0, 1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_and_norm_are_those_of_long_doubles(shape, spread):
    x = numbers(shape, spread)
    wide = x.astype(np.longdouble)
    mean, norm, means = sums(x)
    np.testing.assert_allclose(mean, np.float64(wide.mean()), rtol=2e-7)
    np.testing.assert_allclose(norm, np.float64(np.sqrt((wide**2).sum())), rtol=3e-7)
    for found, axes in zip(means, some_axes(x), strict=True):
        np.testing.assert_allclose(
            found, wide.mean(axes, keepdims=True).astype(np.float64), rtol=2e-7
        )


@pytest.mark.parametrize(("size", "jit"), [(2, True), (1000, True), (70_000, True), (1000, False)])
def test_the_order_does_not_matter(size, jit):
    """Compiled, where XLA folds constants that cancel, and not."""
    x = numbers((size,), 3)
    mean_of, norm_of = (jax.jit(f) if jit else f for f in (mean, norm))
    orders = [np.random.default_rng(i).permutation(x) for i in range(5)] + [
        np.sort(x),
        np.sort(x)[::-1],
    ]
    assert len({float(mean_of(order)) for order in orders}) == 1
    assert len({float(norm_of(order)) for order in orders}) == 1
    assert jit or float(jax.jit(mean)(x)) == float(mean_of(jnp.asarray(x)))


def test_the_parts_of_a_long_axis_are_integers():
    """Beyond 2¹⁵ terms floats would hold too few digits."""
    x = np.full(2**17, 1 / 3, np.float32)
    assert float(jax.jit(mean)(x)) == np.float32(1 / 3)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-37, 1e-20, 4e37])
def test_no_overflow_and_no_loss_of_the_small(value):
    """Where numbers are normal: a CPU takes subnormal ones for 0, or not, as it likes."""
    x = jnp.full((8, 8), value, jnp.float32)
    tolerance = {"rtol": 1e-6} if value == 0 or value > 1e-38 else {"atol": 2e-38}
    np.testing.assert_allclose(jax.jit(mean)(x), value, **tolerance)
    np.testing.assert_allclose(jax.jit(norm)(x), 8 * value, **tolerance)
    np.testing.assert_allclose(jax.jit(mean)(jnp.full(3, 3.4e38)), 3.4e38, rtol=1e-6)


def test_nan_stays_and_nothing_is_zero():
    numbers = [np.ones(shape, np.float32) for shape in [(8,), (4096,), (64, 80), (512, 512)]]
    for x in numbers:
        x[(-1,) * x.ndim] = np.nan
    assert np.isnan(
        jax.jit(lambda numbers: [f(x) for x in numbers for f in (mean, norm)])(numbers)
    ).all()
    nothing = jnp.zeros((0, 3))
    whole, length, columns = jax.jit(lambda: (mean(nothing), norm(nothing), mean(nothing, (0,))))()
    assert whole == length == 0
    assert columns.tolist() == [[0, 0, 0]]


@pytest.mark.usefixtures("x64")
def test_double_precision():
    x = np.random.default_rng(0).lognormal(0, 3, (50, 60))
    np.testing.assert_allclose(jax.jit(mean)(x), x.astype(np.longdouble).mean(), rtol=4e-16)
    z = x + 1j * x[::-1]
    np.testing.assert_allclose(jax.jit(norm)(z), np.linalg.norm(z), rtol=1e-15)


def test_derivatives_are_those_of_the_plain_sums():
    x = jnp.asarray(numbers((4, 6), 1))
    of_norm, expected = jax.jit(lambda x: (jax.grad(norm)(x), x / jnp.linalg.norm(x)))(x)
    np.testing.assert_allclose(of_norm, expected, rtol=1e-6)
    of_mean = jax.jit(jax.grad(lambda x: mean(x, (0,))[0, 2]))(x)
    np.testing.assert_allclose(of_mean, np.eye(6)[2] * np.ones((4, 1)) / 4, rtol=1e-6)
    assert jax.jit(jax.grad(norm))(jnp.zeros(3)).tolist() == [0, 0, 0]


def test_mapped():
    x = numbers((5, 40), 2)
    np.testing.assert_array_equal(jax.jit(jax.vmap(mean))(x), [jax.jit(mean)(row) for row in x])
