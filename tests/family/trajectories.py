"""Gradients that change size and sign, and the parameters after each of 200 steps in float64."""

import jax.numpy as jnp
import numpy as np
import optax
from helpers import paths_of

STEPS = 200
SHAPE = (6, 5)


def problem(seed=0):
    """Gradients that change size and sign, so that ε, maxima and clipping all matter, and where
    they start.
    """
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-4, 1, (STEPS, 1, 1)) * 10.0 ** rng.uniform(-2, 0, SHAPE)
    return rng.standard_normal((STEPS, *SHAPE)) * size, rng.standard_normal(SHAPE)


def all_of_ours(txs, gradients, theta):
    """Of several transformations by name: the parameters after every step, from one program in
    float64.
    """
    return paths_of(txs, jnp.asarray(gradients), jnp.asarray(theta))


def ours(tx, gradients, theta):
    """The parameters after every step of one."""
    return np.asarray(all_of_ours({"": tx}, gradients, theta)[""])


def agree(found, expected, theta, rtol=1e-10):
    """Parameters agree relative to themselves, and so does the distance moved."""
    expected = np.asarray(
        list(expected) if not isinstance(expected, np.ndarray) else expected, np.float64
    )
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * 1e-3)
    moved = np.abs(expected - theta).max()
    assert moved > 1e-3
    assert np.abs(found - expected).max() <= rtol * moved


RATE = optax.cosine_decay_schedule(0.05, STEPS)
