"""Legal input that once made a NaN, an infinity or an error, each with the case that showed it.

The oracle is that updates are finite and as long as they may be.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from counted import counted

import adam_jax as aj

OPTIMIZED = True  # it computes for longer than it compiles


def test_a_tree_that_is_one_integer_or_nothing_passes(member):
    """Its ν is `None`, which is not to say that none is tracked."""
    tx = member(0.1)
    for params in (jnp.arange(3), (None,), optax.MaskedNode(), {}):
        grads = jax.tree.map(lambda p: np.zeros(p.shape, jax.dtypes.float0), params)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert not any(map(np.any, jax.tree.leaves(updates)))


def test_radam_with_a_falling_b2_is_finite():
    """ν then holds squares of more steps than the new b2 ever would, and the rectification was the
    root of a negative number.
    """
    tx, grad = aj.radam(1.0, b2=lambda t: jnp.where(t < 1000, 0.99, 0.5)), jnp.asarray([3.0, -2.0])
    state = jax.lax.scan(
        lambda state, _: (tx.update(grad, state)[1], None), tx.init(grad), length=1000
    )[0]
    updates, state = tx.update(grad, state)
    # rho_inf is 2/(1 − 0.5) − 1 = 3, too short for ν to be trusted: the update is the mean
    # gradient.
    np.testing.assert_allclose(updates, -grad, rtol=1e-5)


def test_adopt_with_a_wrapped_count_is_finite():
    """The fourth root of a count below 0 was NaN, and with it the limit that the update is clipped
    to.
    """
    tx, grad = aj.adopt(0.1), jnp.asarray([3.0, -2.0])
    _, state = tx.update(grad, tx.init(grad))
    for _ in range(3):
        updates, state = tx.update(grad, counted(state, -1))
        assert np.isfinite(updates).all()


def test_adopt_clips_a_complex_leaf_beside_a_float64_one(x64):
    """Its limit is a float64 there, and strict promotion mixes no dtypes."""
    tx = aj.adopt(0.1)
    params = {"narrow": jnp.ones(2, jnp.complex64), "wide": jnp.ones(2, jnp.float64)}
    _, state = tx.update(params, tx.init(params), params)
    updates, _ = tx.update(params, state, params)
    # d = 1 in both, unclipped at the second step; a tenth of it, the mean's share, times the rate.
    assert updates["narrow"].dtype == jnp.complex64
    np.testing.assert_allclose(updates["narrow"], [-0.01, -0.01], rtol=1e-6)
    np.testing.assert_allclose(updates["wide"], [-0.01, -0.01], rtol=1e-6)


def test_codes_of_float64_moments_stay_finite(x64):
    """A ν beyond float32 was stored as the code of an infinity, and was NaN a step later."""
    tx = aj.adam(0.1, 0.1, 0.5, storage=aj.storage.Codes(smallest=0))
    for dtype in (jnp.float64, jnp.complex128):
        grad = jnp.full(3, 1e200, dtype)
        step = lambda state, _, grad=grad: tx.update(grad, state)[::-1]
        assert np.isfinite(jax.lax.scan(step, tx.init(grad), length=9)[1]).all()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_huge_update_is_shortened_to_the_threshold(decay):
    """Squares of updates beyond 2⁶³ are infinite, and the step was 0 or NaN.

    Decay of huge parameters makes such updates.
    """
    params = jnp.asarray([1.5e38, -1.5e38, 0.75e38])
    tx = aj.chain(aj.adamw(0.1, weight_decay=decay), aj.stages.clip_update_rms())
    updates, _ = tx.update(jnp.ones(3), tx.init(params), params)
    # By hand: 2, -2 and 1 in units of their root mean square, √3.
    direction = np.array([-2, 2, -1]) / 3**0.5 if decay else -np.ones(3)
    np.testing.assert_allclose(updates, 0.1 * direction, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_lamb_with_parameters_close_to_the_largest_number(dtype):
    """The quotient of the norms was infinite, and so was the size of a complex number before any
    sum.
    """
    size = 2e38 if dtype == jnp.float32 else 2e38 + 3e38j
    params = jnp.asarray([size, -size, 0.5 * size], dtype)
    tx = aj.lamb(0.1, eps_root=1e-8)
    updates, _ = jax.jit(tx.update)(0.1 * jnp.ones(3, dtype), tx.init(params), params)
    assert np.isfinite(updates).all()
    bound = 0.1 * min(
        float(np.linalg.norm(np.asarray(params, complex))), float(np.finfo(np.float32).max)
    )
    np.testing.assert_allclose(np.linalg.norm(np.asarray(updates, complex)), bound, rtol=1e-5)
