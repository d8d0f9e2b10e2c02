"""`from_optax` keeps the counts of schedules and of moments, and asks for a count where the state
has none.

The oracle is the state of Optax itself.
"""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refused, same
from optax_states import LARGE, RATE, steps_of

import adam_jax as aj


@pytest.mark.usefixtures("standard_promotion")
def test_decays_that_a_state_keeps_are_those_of_tx():
    state = steps_of(optax.inject_hyperparams(optax.adam)(1e-2, b2=0.99), LARGE)
    aj.migrate.from_optax(state, aj.adam(1e-2, b2=0.99), LARGE)
    with refused(
        ValueError, "found b2=0.99 in inject_hyperparams, and 0.999 in tx", "convert_state"
    ):
        aj.migrate.from_optax(state, aj.adam(1e-2), LARGE)


@pytest.mark.parametrize("count", [-1, 1.5, True, "x", 10**10, np.nan])
def test_counts_that_are_none_are_refused(count):
    state = optax.rmsprop(1e-3).init(LARGE)
    with refused(ValueError, f"found {count!r} steps; expected a whole number from 0 on"):
        aj.migrate.from_optax(state, aj.rmsprop(1e-3), LARGE, count=count)


@pytest.mark.usefixtures("standard_promotion")  # Optax's schedules mix dtypes
def test_counts_of_schedules_and_of_moments_are_each_kept():
    theirs, tx = optax.adam(RATE), aj.adam(RATE)
    first, schedule = steps_of(theirs, LARGE)
    state = (first, schedule._replace(count=jnp.int32(2)))
    moved = aj.migrate.from_optax(state, tx, LARGE)
    assert (int(moved[0].count), int(moved[3].step)) == (5, 2)
    same(aj.migrate.to_optax(moved, tx, theirs.init(LARGE)), state)


def test_a_schedule_of_decays_is_taken_step_by_step():
    b1 = optax.linear_schedule(0.5, 0.95, 50)
    moved = aj.migrate.from_optax(
        steps_of(optax.adam(1e-3), LARGE, 30), aj.adam(1e-3, b1=b1), LARGE
    )
    left = np.prod([float(b1(i)) for i in range(30)])
    np.testing.assert_allclose(
        moved[0].weights[0], [1 - left, -np.expm1(30 * np.log(0.999))], rtol=1e-6
    )


def test_a_count_is_asked_for_where_the_state_has_none():
    state, tx = steps_of(optax.rmsprop(1e-3), LARGE), aj.rmsprop(1e-3)
    with refused(ValueError, "keeps no count", "count=1000"):
        aj.migrate.from_optax(state, tx, LARGE)
    moved = aj.migrate.from_optax(state, tx, LARGE, count=5)
    assert moved[0].count == 5
    there = aj.convert_state(moved, tx, aj.rmsprop(1e-3, bias_correction=True), LARGE).state
    np.testing.assert_allclose(there[0].weights[0, 0], 1 - 0.9**5, rtol=1e-6)
    with refused(ValueError, "count=7, and 5"):
        aj.migrate.from_optax(steps_of(optax.adam(1e-3), LARGE), aj.adam(1e-3), LARGE, count=7)


def test_a_long_run_is_counted_out():
    state = steps_of(optax.adam(1e-3), LARGE)
    state = (state[0]._replace(count=jnp.int32(300_000)), state[1])
    moved = aj.migrate.from_optax(state, aj.adam(1e-3, b2=0.999999), LARGE)
    np.testing.assert_allclose(
        moved[0].weights.sum(0), [1, -np.expm1(300_000 * np.log(0.999999))], rtol=2e-7
    )


def test_refuses_a_state_whose_weights_no_count_says():
    tx = aj.adam(1.0)
    state = steps_of(tx, LARGE)
    for changed in (
        aj.reset(state, tx),
        aj.reset(state, tx, match="'w'"),
        (state[0]._replace(count=jnp.int32(0)), *state[1:]),
    ):
        with refused(ValueError, "to_optax", "[0]", "as after `reset`"):
            aj.migrate.to_optax(changed, tx, optax.adam(1.0).init(LARGE))
