"""A step with non-finite gradients is skipped: it changes nothing, is counted, and needs no memory.

The oracle is the same run without those steps.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bits, same
from jax.experimental import checkify
from skipped import PARAMS, gradients, poisoned, run, some

import adam_jax as aj

STORAGES = ["float32", "bfloat16", "8bit"]
GUARDS = {
    "nonfinite": aj.skip_nonfinite,
    "spikes": functools.partial(aj.skip_spikes, window=8, warmup=4),
}
# Each pair of a storage and a guard meets two or three members.
POINTS = [
    (name, storage, guard)
    for name, (storage, guard) in zip(
        aj.family.__all__, itertools.cycle(itertools.product(STORAGES, GUARDS)), strict=False
    )
]


@pytest.mark.parametrize(("name", "storage", "guard"), POINTS)
def test_a_poisoned_step_is_as_if_it_had_not_been(name, storage, guard):
    """Counts, random bits and all, of every member, with bf16 parameters rounded stochastically
    behind it.
    """
    tx = GUARDS[guard](
        aj.chain(getattr(aj, name)(1e-2, storage=storage), aj.round_stochastically())
    )
    good = [gradients() for _ in range(3)]
    params, state = run(tx, PARAMS, good)
    after, skipped = run(
        tx, PARAMS, [good[0], poisoned(good[0]), good[1], poisoned(good[1], "b", -np.inf), good[2]]
    )
    same(after, params)
    same(skipped.inner_state, state.inner_state)
    assert (state.skipped, skipped.skipped, skipped.consecutive, skipped.too_many) == (
        0,
        2,
        0,
        False,
    )
    assert bits(params) != bits(PARAMS)


MORE = {"c": some((5,), jnp.complex64), "h": some((4,), jnp.float16)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", ["w", "b", "s", "c", "h"])
def test_any_element_of_any_leaf_is_poison(leaf, value):
    params, good = PARAMS | MORE, gradients() | MORE
    sick = poisoned(good, leaf, complex(0, value) if leaf == "c" else value)
    after, state = run(aj.skip_nonfinite(aj.adam(0.1)), params, [sick])
    same(after, params)
    assert state.skipped == 1
    assert run(aj.skip_nonfinite(aj.adam(0.1)), params, [good])[1].skipped == 0


def test_a_parameter_of_minus_zero_keeps_its_sign():
    params = {"x": jnp.array([-0.0, 0.0, 1.0])}
    after, _ = run(aj.skip_nonfinite(aj.adam(0.1)), params, [{"x": jnp.array([jnp.nan, 1.0, 1.0])}])
    same(after, params)


def test_large_and_absent_numbers_are_not_poison():
    params = {"x": jnp.ones(3), "empty": jnp.zeros((0, 2))}
    _, state = run(
        aj.skip_nonfinite(aj.adam(0.1)),
        params,
        [{"x": jnp.full(3, 3e38), "empty": jnp.zeros((0, 2))}],
    )
    assert state.skipped == 0
    assert run(aj.skip_nonfinite(aj.adam(0.1)), {}, [{}])[1].skipped == 0


def test_too_many_in_a_row_are_told():
    tx = aj.chain(aj.skip_nonfinite(aj.adam(0.1), max_consecutive=3))
    good, sick = gradients(), poisoned(gradients())
    _, state = run(tx, PARAMS, [sick, sick, good, sick, sick])
    assert (state[0].skipped, state[0].consecutive, state[0].too_many) == (4, 2, False)
    aj.expect_progress(state)
    _, state = run(tx, PARAMS, [sick, sick, sick, good])
    assert (state[0].skipped, state[0].consecutive, state[0].too_many) == (3, 0, True)
    with pytest.raises(
        RuntimeError, match=r"SkipNonfinite at \[0\]: 3 steps skipped in all, 0 in a row now"
    ):
        aj.expect_progress({"optimizer": state}["optimizer"])


def test_checkify_raises_on_the_device():
    tx = aj.skip_nonfinite(aj.adam(0.1), max_consecutive=2, check=True)
    step = jax.jit(checkify.checkify(tx.update, errors=checkify.user_checks))
    state = tx.init({"x": jnp.ones(2)})
    error, (_, state) = step({"x": jnp.full(2, jnp.nan)}, state)
    error.throw()
    error, _ = step({"x": jnp.full(2, jnp.nan)}, state)
    with pytest.raises(
        checkify.JaxRuntimeError, match="skip_nonfinite has skipped 2 steps in a row"
    ):
        error.throw()


def test_counters_saturate():
    tx = aj.skip_nonfinite(aj.adam(0.1))
    top = jnp.int32(2**31 - 1)
    state = tx.init({"x": jnp.ones(2)})._replace(skipped=top, consecutive=top)
    _, after = tx.update({"x": jnp.full(2, jnp.nan)}, state)
    assert (after.skipped, after.consecutive) == (top, top)


LEAVES, SHAPE = 8, (64, 1024)


@functools.cache
def temporary(tx):
    """Temporary bytes of the compiled, donated step, for each parameter."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = [jax.ShapeDtypeStruct(SHAPE, jnp.float32)] * LEAVES
    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(params, jax.eval_shape(tx.init, params), params)
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes / (LEAVES * np.prod(SHAPE))


@pytest.mark.parametrize(
    ("storage", "guard"), [*((storage, "nonfinite") for storage in STORAGES), ("float32", "spikes")]
)
def test_no_second_copy_of_the_state(storage, guard):
    """No more than the step that is not guarded and two leaves' gradients, which are one byte for
    each parameter.

    The state has eight bytes or two for each.
    """
    summed = jax.jit(lambda x: jnp.sum(2 * x)).lower(jnp.ones(SHAPE)).compile()
    if summed.memory_analysis().temp_size_in_bytes > 4 * 64 * 1024 - 1:
        pytest.skip("this version of XLA makes an array of all that it sums on a CPU")
    adam = aj.adam(1e-3, storage=storage)
    assert temporary(GUARDS[guard](adam)) <= temporary(adam) + 2 * 4 / LEAVES + 0.01
