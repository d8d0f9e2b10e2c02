"""`skip_spikes` skips the gradient norms that its docstring names.

The oracle is the rule of the docstring, in NumPy and in double precision.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refused
from skipped import run

import adam_jax as aj


@functools.partial(jax.jit, static_argnums=0)
def course(tx, norms):
    def step(state, norm):
        # Two leaves of which no element has the norm, so that it has to be put together from all.
        updates, state = tx.update(
            {"a": jnp.full((4,), 0.6 * norm / 2), "b": jnp.full((1,), 0.8 * norm)}, state
        )
        return state, updates["b"][0] == 0

    return jax.lax.scan(step, tx.init({"a": jnp.zeros(4), "b": jnp.zeros(1)}), norms)


def judged(norms, **arguments):
    """Which of a course of gradient norms are skipped; one program for courses of up
    to 600 norms.
    """
    tx = aj.skip_spikes(optax.identity(), **arguments)
    state, skipped = course(
        tx, np.pad(np.asarray(norms, np.float32), (0, 600 - len(norms)), constant_values=1.0)
    )
    assert int(state.skipped) == skipped.sum()
    return np.asarray(skipped)[: len(norms)]


def far(norms, deviations, least_ratio, window, warmup):
    """The rule, as its docstring has it, in NumPy and in double precision."""
    seen, skipped = [], []
    for norm in norms:
        logs = np.log(seen[-window:]) if seen else np.zeros(1)
        center = np.sort(logs)[(len(logs) - 1) // 2]
        spread = 1.4826 * np.sort(abs(logs - center))[(len(logs) - 1) // 2]
        limit = center + max(deviations * spread, np.log(least_ratio))
        is_far = len(seen) >= warmup and np.log(norm) > limit if np.isfinite(norm) else True
        skipped.append(is_far)
        seen += [norm] if np.isfinite(norm) else []
    return np.array(skipped)


@pytest.mark.parametrize("arguments", [(6.0, 2.0, 128, 32), (3.0, 1.0, 16, 1), (4.0, 1.5, 9, 9)])
def test_the_rule_is_the_one_in_the_docstring(arguments):
    random = np.random.default_rng(1)
    norms = np.exp(random.normal(0, 0.3, 600) - np.linspace(0, 4, 600))
    norms[random.integers(0, 600, 30)] *= np.exp(random.normal(0, 3, 30))
    norms[random.integers(0, 600, 5)] = np.inf
    found = judged(
        norms,
        **dict(zip(("deviations", "least_ratio", "window", "warmup"), arguments, strict=True)),
    )
    expected = far(norms.astype(np.float32).astype(float), *arguments)
    np.testing.assert_array_equal(found, expected)
    assert 5 < expected.sum() < 300


def test_a_narrow_distribution_allows_twice_its_median():
    assert not judged([1.0] * 40 + [1.99] * 40).any()
    assert judged([1.0] * 40 + [2.1]).sum() == 1


def test_smaller_norms_are_never_far_and_a_new_level_is_taken_after_half_a_window():
    assert not judged(np.concatenate([np.ones(40), np.full(40, 1e-6), np.full(40, 1e-18)])).any()
    skipped = judged(np.concatenate([np.ones(128), np.full(200, 100.0)]))
    assert skipped[128:192].all()
    assert not skipped[193:].any()


def test_spikes_that_are_a_part_of_the_data_are_too_many():
    """E9: every twentieth batch has five times the norm of the others, and none was ever learned
    from, without a word. One in a hundred is a spike.
    """
    norms = np.exp(np.random.default_rng(0).normal(0, 0.05, 600)).astype(np.float32)
    rare, regular = norms.copy(), norms.copy()
    rare[::100] *= 5
    regular[::20] *= 5
    states = [course(aj.skip_spikes(optax.identity()), x)[0] for x in (rare, regular)]
    assert [bool(state.too_many) for state in states] == [False, True]
    aj.expect_progress(states[0])
    with refused(RuntimeError, "too many steps were skipped", "SkipSpikes at the top"):
        aj.expect_progress(states[1])


def test_a_ring_that_was_filled_many_times_stays_a_ring():
    tx = aj.skip_spikes(optax.identity(), window=4, warmup=2)
    norms = 1 + jnp.arange(23.0)[:, None] / 100
    state = jax.lax.scan(
        lambda state, norm: (tx.update(norm, state)[1], None), tx.init(jnp.zeros(1)), norms
    )[0]
    np.testing.assert_allclose(np.sort(state.norms), [1.19, 1.2, 1.21, 1.22], rtol=1e-6)
    assert 4 <= state.seen < 8


def test_gradients_of_zero_say_nothing_of_a_level():
    """A masked loss, a frozen phase: the first real gradient is no spike."""
    norms = np.concatenate([np.zeros(40), np.ones(41)])
    tx = aj.skip_spikes(aj.adam(0.1))
    _, state = run(tx, {"x": jnp.ones(1)}, [{"x": jnp.full(1, norm)} for norm in norms])
    assert (state.skipped, state.seen) == (0, 41)


def test_a_window_smaller_than_the_usual_warmup():
    assert judged([1.0] * 16 + [100.0], window=16).sum() == 1


def test_traced_limits():
    @jax.jit
    def skipped(ratio):
        tx = aj.skip_spikes(
            optax.identity(), least_ratio=ratio, deviations=ratio, window=4, warmup=2
        )
        state = tx.init(jnp.zeros(1))
        for norm in (1.0, 1.0, 1.0, 3.0):
            _, state = tx.update(jnp.full(1, norm), state)
        return state.skipped

    assert (skipped(2.0), skipped(4.0)) == (1, 0)
