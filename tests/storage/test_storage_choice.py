"""Which moments and which leaves a choice of storage narrows.

The oracle is the dtype of every moment, written out here.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import avals, normals, same
from stored import WIDE, mixed

import adam_jax as aj
from adam_jax import storage
from adam_jax.storage.slot import MomentSlot

OPTIMIZED = True  # it computes for longer than it compiles


def test_storage_is_keyword_only_and_float32_by_default(member):
    for make in (member, aj.track_moments, aj.stages.keep_maximum, aj.stages.mix_slow_mean):
        parameter = inspect.signature(make).parameters["storage"]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default == "float32"
    start = mixed()
    same(member(0.1, storage="float32").init(start), member(0.1).init(start))


@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, "float16", np.float32, jnp.float8_e4m3fn, jnp.dtype("float8_e5m2")],
    ids=repr,
)
def test_mu_dtype_and_nu_dtype_narrow_leaves_of_any_size(dtype):
    params = {"w": normals(4, 3), "b": normals(7), "empty": jnp.zeros((0, 3))}
    for name, other in (("mu", "nu"), ("nu", "mu")):
        tx = aj.track_moments(**{f"{name}_dtype": dtype})
        state = tx.init(params)
        expected = avals(state)
        assert {leaf.dtype for leaf in jax.tree.leaves(getattr(state, name))} == {jnp.dtype(dtype)}
        assert {leaf.dtype for leaf in jax.tree.leaves(getattr(state, other))} == {
            jnp.dtype(jnp.float32)
        }
        state = jax.jit(tx.update)(params, state)[1]
        assert avals(state) == expected
        np.testing.assert_allclose(
            state.mu["w"].astype(jnp.float32), 0.1 * params["w"], rtol=0.3, atol=0.01
        )


@pytest.mark.parametrize(
    "options",
    [{"mu_dtype": jnp.bfloat16}, {"storage": storage.Codes(smallest=0)}],
    ids=["float", "codes"],
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 0)], ids=str)
def test_the_smallest_leaves_are_narrowed_where_it_is_asked_for(shape, options):
    tx = aj.adam(0.1, **options)
    state, step = tx.init(jnp.ones(shape)), jax.jit(tx.update)
    for _ in range(2):
        updates, state = step(jnp.ones(shape), state)
        assert state[0].mu.shape == shape
        assert state[0].mu.dtype != jnp.float32
        np.testing.assert_allclose(updates, np.full(shape, -0.1), rtol=0.5)


@pytest.mark.parametrize(
    "form",
    [storage.Codes(smallest=8), storage.Float(jnp.bfloat16, smallest=8)],
    ids=["codes", "float"],
)
def test_smallest_is_the_smallest_that_is_narrowed(form):
    state = aj.adam(0.1, storage=form).init([jnp.ones(7), jnp.ones(8), jnp.ones((2, 4))])[0]
    assert [leaf.dtype == jnp.float32 for leaf in state.mu] == [True, False, False]


def test_a_pair_is_for_mu_and_for_nu_and_for_what_is_like_them():
    params = jnp.ones(WIDE)
    amsgrad = aj.amsgrad(0.1, storage=("bfloat16", "8bit")).init(params)
    assert (amsgrad[0].mu.dtype, amsgrad[0].nu.dtype, amsgrad[2].nu_max.dtype) == (
        jnp.bfloat16,
        jnp.uint8,
        jnp.uint8,
    )
    mixing = aj.ademamix(0.1, storage=("8bit", "float32")).init(params)
    assert (mixing[0].mu.dtype, mixing[0].nu.dtype, mixing[2].mu_slow.dtype) == (
        jnp.int8,
        jnp.float32,
        jnp.int8,
    )
    adopt = aj.adopt(0.1, storage=("bfloat16", "8bit")).init(params)
    assert (adopt[0].nu.dtype, adopt[3].mu.dtype) == (jnp.uint8, jnp.bfloat16)
    both = aj.amsgrad(0.1, mu_dtype=jnp.bfloat16, nu_dtype=jnp.float16).init(params)
    assert (both[0].mu.dtype, both[0].nu.dtype, both[2].nu_max.dtype) == (
        jnp.bfloat16,
        jnp.float16,
        jnp.float16,
    )
    beside = aj.ademamix(0.1, mu_dtype=jnp.bfloat16, storage=("float32", "8bit")).init(params)
    assert (beside[0].mu.dtype, beside[0].nu.dtype, beside[2].mu_slow.dtype) == (
        jnp.bfloat16,
        jnp.uint8,
        jnp.bfloat16,
    )


def test_yogi_starts_where_it_says_in_codes_too():
    state = aj.yogi(0.1, storage="8bit", initial_accumulator_value=1e-6).init(jnp.ones(WIDE))[0]
    nu = MomentSlot("nu", storage.Codes(), signed=False).widen(state.nu, state.scales)
    np.testing.assert_allclose(nu, np.full(WIDE, 1e-6), rtol=1 / 16)
