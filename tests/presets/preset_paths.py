"""Gradients from 10 down to 1e-10, the parameters of presets along them, and how two paths are
compared.
"""

import jax.numpy as jnp
import numpy as np
from helpers import paths_of

from adam_jax import presets

STEPS = 250
SHAPE = (6, 5)
EXACT = 1e-10  # float64 on both sides; most agree to 1e-13
FLOAT32 = 2e-5
PRESETS = [(which, name) for which in presets.__all__ for name in getattr(presets, which).__all__]


def problem(seed=0):
    """Gradients from 10 down to 1e-10 of an element, so that most ε are larger than some of them,
    and where they start.
    """
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-2, 1, (STEPS, 1, 1)) * 10.0 ** np.linspace(-8, 0, 30).reshape(SHAPE)
    return rng.standard_normal((STEPS, *SHAPE)) * size, rng.standard_normal(SHAPE)


def leaves(array):
    """The same as two leaves, so that norms of a leaf and of all differ."""
    return [array[..., :2, :], array[..., 2:, :]]


def all_of_ours(txs, gradients, theta, dtype="float64"):
    """Of several transformations by name: the parameters after every step, from one program."""
    gradients, theta = (leaves(jnp.asarray(array, dtype)) for array in (gradients, theta))
    return {name: np.concatenate(path, 1) for name, path in paths_of(txs, gradients, theta).items()}


def agree(found, expected, theta, rtol):
    """The way from the start agrees element by element: those that move by little, where ε is all,
    count like the others.
    """
    found, expected = (np.asarray(path, np.float64) - theta for path in (found, expected))
    moved = np.abs(expected).max(0)
    assert moved.min() > 0
    error = (np.abs(found - expected).max(0) / moved).max()
    assert error <= rtol


def rate(count):
    """A learning rate that changes, for what depends on the order of rate and momentum."""
    return 0.03 / (1 + 0.02 * jnp.asarray(count, float))
