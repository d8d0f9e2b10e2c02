"""Gradients too large or too small for a storage leave finite states and bounded steps.

The oracle is Adam's bound on a step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICKLY, normals
from narrowing import FLOATS
from stored import WIDE

import adam_jax as aj
from adam_jax import storage

OPTIMIZED = True  # it computes for longer than it compiles


@pytest.mark.parametrize("then", [1.0, None], ids=["then_1", "then_the_same"])
@pytest.mark.parametrize("first", [1e7, 1e9, np.inf], ids="{:g}".format)
@pytest.mark.parametrize("how", ["bfloat16", "8bit"])
def test_a_huge_first_gradient_leaves_a_finite_state_and_bounded_steps(how, first, then):
    tx = aj.adam(1.0, storage=how)
    state, step = tx.init(jnp.zeros(WIDE)), jax.jit(tx.update)
    for t in range(30):
        updates, state = step(jnp.full(WIDE, first if t == 0 or then is None else then), state)
        assert np.isfinite(updates).all(), t
        assert np.abs(updates).max() <= 10, t


SPIKED = {
    "wide and codes": aj.adam(1.0, storage=("float32", "8bit")),
    "bfloat16 and codes": aj.adam(1.0, storage=("bfloat16", "8bit")),
    "bfloat16 and float16": aj.adam(1.0, storage=("bfloat16", storage.Float(jnp.float16))),
    "codes that start elsewhere": aj.yogi(1.0, storage="8bit"),
    "a slow mean": aj.ademamix(1.0, storage=("float32", "8bit")),
    "a maximum": aj.adamax(1.0, storage=("float32", "8bit")),
    "a block": aj.adam_mini(1.0, storage=("float32", storage.Codes(smallest=0))),
}
COURSES = np.array(
    [
        [1, 1, 1, 1e10, 1, 1],
        [1e10, 1, 1, 1, 1, 1],
        [1e-3, 1e-3, 1e-3, 1e4, 1, 1e-3],
        [1, 1e7, 1, 1, 1e8, 1],
    ]
)


def longest_steps(txs, dtype):
    """The longest step of each optimizer on each course of gradients, the same for all elements."""

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(courses):
        def follow(tx):
            def step(state, g):
                grads = jnp.full((32, 128), g, dtype)
                updates, state = tx.update(grads, state, jnp.ones_like(grads))
                return state, jnp.max(jnp.abs(updates))

            first = tx.init(jnp.ones((32, 128), dtype))
            return jax.lax.map(
                lambda course: jnp.max(jax.lax.scan(step, first, course)[1]), courses
            )

        return {name: follow(tx) for name, tx in txs.items()}

    return jax.device_get(run(COURSES))


def test_no_gradient_is_stored_in_mu_that_is_too_large_for_nu():
    """Else μ over the root of a ν that has saturated is a step of thousands of learning rates.

    Adam's bound is 7.3 of them.
    """
    for name, longest in longest_steps(SPIKED, jnp.float32).items():
        assert (longest < 10).all(), (name, longest)
    (longest,) = longest_steps({"complex": aj.adam(1.0, storage="8bit")}, jnp.complex64).values()
    assert (longest < 10).all(), longest


CODED_APART = {
    "axes": ((storage.Codes(axis=-2), "8bit"), (64, 128)),
    "leaf and rows": ((storage.Codes(axis=None), "8bit"), (64, 128)),
    "sizes": (("8bit", storage.Codes(smallest=0)), (16, 128)),
}


@pytest.mark.parametrize("name", CODED_APART)
def test_codes_of_mu_and_nu_that_do_not_share_scales_alike(name):
    """A row whose gradients grow ten billion times, among others that are as large already; then
    all of them.
    """
    how, shape = CODED_APART[name]
    tx, ones = aj.adam(1.0, storage=how), jnp.ones(shape)
    state, step = tx.init(ones), jax.jit(tx.update, compiler_options=QUICKLY)
    for grads in [ones.at[0].set(1e-10)] * 3 + [
        ones,
        ones.at[0].set(1e-10),
        ones * 1e10,
        ones,
        ones,
    ]:
        updates, state = step(grads, state)
        assert np.abs(updates).max() < 10


def test_no_gradient_of_float64_is_too_large_for_a_narrow_nu(x64):
    txs = {how: aj.adam(1.0, storage=how) for how in ("bfloat16", "8bit")}
    for dtype in (jnp.float64, jnp.complex128):
        tx_grads = np.array([1, 1e100, 1, 1])
        for how, tx in txs.items():
            params = jnp.ones((32, 128), dtype)
            state = tx.init(params)
            for g in tx_grads:
                updates, state = tx.update(jnp.full_like(params, g), state, params)
                assert float(jnp.max(jnp.abs(updates))) < 10, (how, dtype)


# A NaN is shown once by its own step; codes have none, so the element learns again.


def test_nan_is_stored_as_zero_in_codes_and_as_nan_in_floats():
    grads = jnp.ones(WIDE).at[5].set(jnp.nan)
    for how, lasts in (("8bit", False), ("bfloat16", True)):
        tx = aj.adam(1.0, storage=how)
        updates, state = tx.update(grads, tx.init(grads))
        assert np.isnan(updates[5])
        assert np.isfinite(np.delete(np.asarray(updates), 5)).all()
        updates, state = tx.update(jnp.ones(WIDE), state)
        assert np.isnan(updates[5]) == lasts
        assert np.isfinite(np.delete(np.asarray(updates), 5)).all()


@pytest.mark.parametrize("dtype", [name for name in FLOATS if name != "bfloat16"])
def test_a_positive_nu_stays_positive_in_a_float_of_a_small_range(dtype):
    """Or its next update would have no denominator: gradients of 1e-5 square to less than float16's
    smallest number.
    """
    tx = aj.adam(1.0, nu_dtype=jnp.dtype(dtype))
    state, step = tx.init(jnp.zeros(WIDE)), jax.jit(tx.update)
    for seed in range(20):
        updates, state = step(1e-5 * normals(WIDE, seed=seed), state)
        assert np.abs(updates).max() <= 1.5
    assert (np.asarray(state[0].nu, np.float32) > 0).all()
