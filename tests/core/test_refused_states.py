"""States that are not the transformation's own are refused when an update is traced.

A message names the array of the state; it is written out here.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import refused
from refused_params import PARAMS

import adam_jax
from adam_jax import (
    chain,
)
from adam_jax.stages import average_parameters


@pytest.mark.parametrize(
    "other", [optax.adam(0.1), adam_jax.momentum(0.1)], ids=["optax.adam", "momentum"]
)
def test_the_state_of_another_transformation(other):
    with refused(
        ValueError, "adam(", "got the state of another transformation", "where it keeps 4", "(state"
    ):
        adam_jax.adam(0.1).update(PARAMS, other.init(PARAMS), PARAMS)


LISTED = {
    "adam": (adam_jax.adam(0.1), "[0].mu['head']['b']"),
    "8bit": (adam_jax.adam(0.1, storage=adam_jax.storage.Codes(smallest=0)), "[0].mu['head']['b']"),
    "one array": (adam_jax.adam(0.1), "[0].mu"),
    "a number": (adam_jax.adam(0.1), "[0].mu"),
    "skip_spikes": (adam_jax.skip_spikes(adam_jax.adam(0.1)), ".norms"),
    "by_path": (
        adam_jax.by_path({"head/w": {"b1": 0.5}}, adam_jax.adam(0.1)),
        ".inner_states['head/w'][0].mu['head']['w']",
    ),
    "average": (chain(adam_jax.adam(0.1), average_parameters(0.9)), "[0][0].mu['head']['b']"),
}


@pytest.mark.parametrize("name", LISTED)
def test_a_state_whose_arrays_became_lists(name):
    tx, place = LISTED[name]
    params = {"one array": jnp.ones((2, 3)), "a number": jnp.ones(())}.get(name, PARAMS)
    state = jax.tree.map(lambda x: x.tolist(), tx.init(params))
    kind = "float" if name == "a number" else "list"
    says = f"the state has a {kind} at {place}; expected an array", "target", "jnp.asarray"
    for caller, use in {
        "update": lambda: tx.update(params, state, params),
        "reset": lambda: adam_jax.reset(state, tx),
        "hyperparameters": lambda: adam_jax.hyperparameters(state, tx),
    }.items():
        with refused(TypeError, f"{caller}: the state has", *says):
            use()
    with (
        refused(TypeError, ".weights; expected an array")
        if name != "skip_spikes"
        else refused(TypeError, "expected an array")
    ):
        jax.eval_shape(
            tx.update, params, state, params
        )  # traced, the numbers in the lists are arrays


def test_numbers_may_stand_for_counts_and_for_settable_values():
    tx = adam_jax.adam(adam_jax.settable(0.1))
    state = optax.tree.set(tx.init(PARAMS), count=3, learning_rate=0.2)
    tx.update(PARAMS, state)


def test_weights_of_another_shape():
    """One for both moments would be broadcast to both."""
    tx = adam_jax.adam(0.1)
    moments, *others = tx.init(PARAMS)
    state = (moments._replace(weights=moments.weights[:, :1]), *others)
    with refused(ValueError, "found weights of shape (2, 1)", "expected (2, 2)"):
        tx.update(PARAMS, state, PARAMS)


def test_a_state_that_was_made_under_vmap_and_is_updated_without():
    """With as many members as moments its debias factors were taken for those of leaves."""
    tx, stacked = adam_jax.adam(0.1), jnp.ones((2, 3))
    state = jax.vmap(tx.init)(stacked)
    state = jax.vmap(tx.update)(stacked, state, stacked)[1]
    with refused(ValueError, "[0].count of shape (2,)", "under jax.vmap"):
        tx.update(stacked, state, stacked)
