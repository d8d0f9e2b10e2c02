"""Hyperparameters of a run: what a state holds of them, what is read and set, and how little it
costs.
"""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUICKLY, bits, normals, refused, same

import adam_jax as aj
from adam_jax import settable
from benchmarks.kernels import PAIRS, RATES, count_arrays, count_kernels

PARAMS = {"body": normals(6, 4), "head": normals(4, 3, seed=1)}
FADING = optax.linear_schedule(1.0, 0.0, 10)


def go_on(tx, state, steps=1, params=PARAMS):
    for _ in range(steps):
        updates, state = tx.update(params, state, params)
    return updates, state


# What a state holds


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", sorted(PAIRS.keys() - {"lamb"}))
def test_kernels_and_arrays_are_few(name, rate, standard_promotion):
    """lamb's exact norms have no bound."""
    ours, theirs = (make(RATES[rate]) for make in PAIRS[name])
    assert count_arrays(ours) <= count_arrays(theirs) + 1
    assert count_kernels(ours) <= count_kernels(theirs) + 1


def test_what_a_state_holds():
    """By hand: Adam's four stages, with a schedule for a rate and a decay that is settable."""
    tx = aj.adam(FADING, b2=settable(0.99))
    first, corrected, scaled, rated = tx.init(jnp.ones(2))
    assert first._fields == ("count", "mu", "nu", "weights", "hyperparams", "scales")
    assert (first.hyperparams, first.scales, corrected, scaled.hyperparams) == (
        {"b2": jnp.float32(0.99)},
        {},
        optax.EmptyState(),
        {},
    )
    assert (rated.step.dtype, rated.hyperparams) == (jnp.int32, {})
    assert aj.adam(0.1).init(jnp.ones(2))[3] == (None, {})


# What is read

MADE = {
    "adamw": aj.adamw,
    "chain": lambda rate: aj.chain(optax.clip(1.0), aj.adamw(rate), aj.stages.cautious()),
    "skip": lambda rate: aj.skip_nonfinite(aj.adamw(rate)),
    "observe": lambda rate: aj.observe(aj.skip_spikes(aj.adamw(rate))),
    "rounding": lambda rate: aj.chain(aj.adamw(rate, storage="8bit"), aj.round_stochastically()),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(
    "rate", [0.5, FADING, settable(0.5)], ids=["number", "schedule", "settable"]
)
def test_names_do_not_depend_on_wrappers(name, rate):
    tx = MADE[name](rate)
    found = aj.hyperparameters(tx.init(PARAMS), tx)
    assert found.keys() == {"b1", "b2", "eps", "eps_root", "weight_decay", "learning_rate"}
    assert found["learning_rate"] == (1.0 if rate is FADING else 0.5)
    assert found["weight_decay"] == jnp.float32(1e-4)


def test_names_of_groups_and_of_what_occurs_twice():
    inner = aj.by_path({"head": {"learning_rate_multiplier": 0.5}}, aj.adam(0.25))
    found = aj.hyperparameters(inner.init(PARAMS), inner)
    assert (found["head/learning_rate"], found["default/learning_rate"]) == (0.125, 0.25)
    nested = aj.by_path({".*": inner}, "frozen")
    assert ".*/head/learning_rate" in aj.hyperparameters(nested.init(PARAMS), nested)
    tx = aj.chain(aj.adam(0.25), aj.track_moments(0.5, None, mu_rule="sum"), aj.stages.take_mu())
    found = aj.hyperparameters(tx.init(PARAMS), tx)
    assert (found["b1"], found["b1#1"]) == (jnp.float32(0.9), 0.5)


WRAPPED = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, {"body": True, "head": False}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_behind_a_wrapper_of_optax(name, standard_promotion):
    inner = aj.adam(0.5)
    found = aj.hyperparameters(WRAPPED[name](inner).init(PARAMS), inner)
    assert found["learning_rate"] == 0.5


# What is set


def test_a_set_value_is_the_one_that_is_used():
    tx = aj.skip_nonfinite(aj.adam(settable(0.5), eps=settable(0.0)))
    _, state = go_on(tx, tx.init(PARAMS), 3)
    for new in (
        aj.set_hyperparameters(state, tx, learning_rate=0.25),
        optax.tree.set(state, learning_rate=jnp.float32(0.25)),
    ):
        assert aj.hyperparameters(new, tx)["learning_rate"] == 0.25
        same(go_on(tx, new)[0], jax.tree.map(lambda x: x / 2, go_on(tx, state)[0]))
    assert aj.hyperparameters(go_on(tx, new)[1], tx)["learning_rate"] == 0.25


@pytest.mark.parametrize(
    "argument", ["b1", "b2", "eps", "eps_root", "weight_decay", "learning_rate"]
)
def test_a_settable_value_is_as_a_traced_one(argument):
    """The same operations on the same numbers, so the same bits."""
    numbers = {
        "learning_rate": 0.5,
        "b1": 0.75,
        "b2": 0.5,
        "eps": 0.125,
        "eps_root": 0.25,
        "weight_decay": 0.0625,
    }

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def both(value):
        made = (
            aj.adamw(**numbers | {argument: value}),
            aj.adamw(**numbers | {argument: settable(value)}),
        )
        return [go_on(tx, tx.init(PARAMS), 3)[0] for tx in made]

    traced, kept = both(numbers[argument])
    assert bits(traced) == bits(kept)


def test_a_decay_follows_a_rate_that_is_set():
    """decay="independent": relative to the first value, at both places of the state."""
    tx = aj.adamw(settable(0.5), weight_decay=0.5, decay="independent")
    params, grads = jnp.ones(2), jnp.zeros(2)
    state = tx.init(params)
    np.testing.assert_allclose(tx.update(grads, state, params)[0], -0.5, rtol=1e-6)
    halved = aj.set_hyperparameters(state, tx, learning_rate=0.25)
    np.testing.assert_allclose(tx.update(grads, halved, params)[0], -0.25, rtol=1e-6)


def test_groups_are_set_together_or_alone():
    tx = aj.by_path({"head": {"learning_rate_multiplier": 0.5}}, aj.adam(settable(1.0)))
    state = tx.init(PARAMS)
    all_of_them = aj.hyperparameters(aj.set_hyperparameters(state, tx, learning_rate=0.25), tx)
    assert (all_of_them["head/learning_rate"], all_of_them["default/learning_rate"]) == (
        0.125,
        0.25,
    )
    one = aj.hyperparameters(aj.set_hyperparameters(state, tx, {"head/learning_rate": 0.25}), tx)
    assert (one["head/learning_rate"], one["default/learning_rate"]) == (0.125, 1.0)


def test_one_of_two_that_have_one_name_is_set():
    again = (aj.track_moments(settable(0.5), None, mu_rule="sum"), aj.stages.take_mu())
    tx = aj.chain(
        aj.track_moments(settable(0.9), None), *again[1:], *again, aj.scale_by_learning_rate(0.1)
    )
    state = tx.init(PARAMS)
    for name in ("b1", "b1#1"):
        used = aj.hyperparameters(aj.set_hyperparameters(state, tx, {name: 0.25}), tx)
        assert {its for its in ("b1", "b1#1") if used[its] == 0.25} == {name}


def test_nothing_is_compiled_again():
    tx = aj.by_path(
        {"head": {"learning_rate_multiplier": 0.5}}, aj.adam(settable(1.0), b2=settable(0.9))
    )
    tx = aj.skip_nonfinite(tx)
    traced = []

    @jax.jit
    def step(state):
        traced.append(None)
        return tx.update(PARAMS, state, PARAMS)[1]

    state = step(tx.init(PARAMS))
    for value in (0.5, np.float32(0.25), jnp.float32(0.125)):
        state = step(aj.set_hyperparameters(state, tx, learning_rate=value, b2=value))
    state = step(optax.tree.set(state, learning_rate=jnp.float32(2.0)))
    assert len(traced) == 1


def test_saved_and_carried_over():
    tx = aj.adam(settable(1.0))
    state = aj.set_hyperparameters(go_on(tx, tx.init(PARAMS))[1], tx, learning_rate=0.25)
    assert aj.hyperparameters(pickle.loads(pickle.dumps(state)), tx)["learning_rate"] == 0.25
    new = aj.adamw(settable(5.0), storage="8bit")
    there = aj.convert_state(state, tx, new, PARAMS).state
    assert aj.hyperparameters(there, new)["learning_rate"] == 0.25
    with jax.numpy_dtype_promotion("standard"):
        theirs = optax.inject_hyperparams(optax.adam)(1.0)
        injected = go_on(theirs, theirs.init(PARAMS))[1]
    injected = injected._replace(
        hyperparams=injected.hyperparams | {"learning_rate": jnp.float32(0.125)}
    )
    assert (
        aj.hyperparameters(aj.migrate.from_optax(injected, tx, PARAMS), tx)["learning_rate"]
        == 0.125
    )


def test_what_cannot_be_set_is_not_there():
    tx = aj.adam(0.1)
    with pytest.raises(KeyError):
        optax.tree.set(tx.init(PARAMS), learning_rate=0.5)
    with refused(
        ValueError,
        "set_hyperparameters: learning_rate is not settable in adam(",
        "settable(...)",
        "convert_state",
    ):
        aj.set_hyperparameters(tx.init(PARAMS), tx, learning_rate=0.5)
    with refused(ValueError, "found 'rate'; expected one of b1, b2"):
        aj.set_hyperparameters(tx.init(PARAMS), tx, rate=0.5)
    kept = aj.adam(settable(0.1))
    with refused(ValueError, "learning_rate: found nan"):
        aj.set_hyperparameters(kept.init(PARAMS), kept, learning_rate=np.nan)
    with refused(TypeError, "settable: found", "A schedule cannot be set"):
        settable(lambda count: 0.1)
    with refused(ValueError, "hyperparameters: adam(", "the states of 3 stages (TrackSumState"):
        aj.hyperparameters(aj.momentum(0.1).init(PARAMS), tx)
    with refused(TypeError, "hyperparameters: tx: found"):
        aj.hyperparameters(tx.init(PARAMS), None)


# Schedules


def test_set_step_moves_schedules_and_nothing_else():
    tx = aj.chain(
        aj.adamw(FADING, eps=optax.linear_schedule(0.0, 1.0, 10)), aj.stages.clip_update_rms(FADING)
    )
    _, state = go_on(tx, tx.init(PARAMS), 3)
    moved = aj.set_step(state, tx, 6)
    same(
        [x for x in jax.tree.leaves(moved) if x.dtype != jnp.int32],
        [x for x in jax.tree.leaves(state) if x.dtype != jnp.int32],
    )
    used = aj.hyperparameters(go_on(tx, moved)[1], tx)
    np.testing.assert_allclose(
        [used["learning_rate"], used["eps"], used["threshold"]], [0.4, 0.6, 0.4], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("tx", "step", "error", "says"),
    [
        (aj.adam(FADING), -1, ValueError, "step: found -1; expected a number from 0"),
        (aj.adam(FADING), 2.0, TypeError, "step: found 2.0; expected a whole number"),
        (aj.adam(0.1), 3, ValueError, "found no schedule in adam("),
    ],
)
def test_a_step_that_cannot_be(tx, step, error, says):
    with refused(error, says):
        aj.set_step(tx.init(PARAMS), tx, step)
