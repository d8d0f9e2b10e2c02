"""What is moved can be donated: nothing that the caller still has is deleted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import same

import adam_jax as aj

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
TX = aj.chain(aj.adamw(optax.linear_schedule(0.1, 0.0, 9)), aj.stages.average_parameters(0.9))
ADAM = aj.adam(1e-3)


def trained(tx, state=None):
    state = tx.init(PARAMS) if state is None else state
    return tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)[1]


MOVES = {
    "convert_state to the same": lambda s: aj.convert_state(s, TX, TX, PARAMS).state,
    "convert_state to another": lambda s: (
        aj.convert_state(s, TX, aj.skip_nonfinite(aj.adam(1e-3)), PARAMS).state
    ),
    "reset of moments": lambda s: aj.reset(s, TX, match="w"),
    "reset of schedules": lambda s: aj.reset(s, TX, moments=False, schedule=True),
    "to_optax": lambda s: aj.migrate.to_optax(s, TX, LIKE),
}
LIKE = optax.adamw(optax.linear_schedule(0.1, 0.0, 9)).init(PARAMS)


def donate(new, *kept):
    """Donates a state as a training step does, and reads what the caller kept."""
    # Copied first: a view of NumPy on an array would keep JAX from donating it.
    before = jax.tree.map(lambda x: np.array(jnp.copy(x)), kept)
    arrays = [leaf for leaf in jax.tree.leaves(new) if isinstance(leaf, jax.Array)]
    other = lambda x: ~x if x.dtype == bool else x + 1
    step = jax.jit(lambda state: jax.tree.map(other, state), donate_argnums=0)
    jax.block_until_ready(step(arrays))
    assert any(leaf.is_deleted() for leaf in arrays)  # it was donated
    same(kept, before)


@pytest.mark.parametrize("case", MOVES)
def test_a_moved_state_can_be_donated_and_the_old_one_used(case):
    """B11: the new state held the caller's arrays, and its donation deleted them."""
    old = trained(TX)
    donate(MOVES[case](old), old, PARAMS, LIKE)
    trained(TX, old)


@pytest.mark.usefixtures("standard_promotion")
def test_states_from_other_libraries_can_be_donated():
    """B11: from Optax and from PyTorch; of average_parameters, which begins with the parameters."""
    theirs = optax.adam(1e-3)
    old = trained(theirs)
    donate(aj.migrate.from_optax(old, ADAM, PARAMS), old, PARAMS)
    tx = aj.chain(ADAM, aj.stages.average_parameters(0.9))
    arrays = {"b": np.ones(3, np.float32), "w": np.ones((2, 3), np.float32)}
    entries = {
        i: {"step": 3.0, "exp_avg": x, "exp_avg_sq": x} for i, x in enumerate(arrays.values())
    }
    saved = {"state": entries, "param_groups": [{"betas": (0.9, 0.999), "params": [0, 1]}]}
    state = aj.migrate.from_torch(saved, tx, PARAMS, names=["b", "w"])
    donate(state, PARAMS)


def test_numbers_that_are_set_can_be_donated():
    """B11: one array for two groups was two leaves, which no step can donate, and the caller's."""
    rate = optax.linear_schedule(0.1, 0.0, 9)
    tx = aj.by_path({"w": aj.adam(aj.settable(0.1), b1=rate)}, aj.adam(aj.settable(0.1), b1=rate))
    value, step = jnp.float32(0.5), jnp.int32(3)
    state = aj.set_hyperparameters(tx.init(PARAMS), tx, learning_rate=value)
    donate(aj.set_step(state, tx, step), value, step, PARAMS)


def test_only_what_is_shared_is_copied_and_as_it_was():
    """B11: with its sharding, its dtype and without one copy more."""
    given, fresh = {"x": jnp.ones(4), "w": jnp.ones(())}, jnp.zeros(3)
    made = {"x": given["x"], "again": given["x"], "fresh": fresh, "number": 1.0}
    found = aj.migrate.owned.owned(made, given)
    assert found["fresh"] is fresh
    assert found["number"] == 1.0
    assert found["x"] is not given["x"]
    assert found["x"].unsafe_buffer_pointer() != found["again"].unsafe_buffer_pointer()
    assert found["x"].sharding == given["x"].sharding
    assert found["x"].committed == given["x"].committed
    # Two leaves that are one array could not be donated.
    both = aj.migrate.owned.owned({"a": fresh, "b": fresh})
    assert both["a"] is not both["b"]
    # Under jit there is nothing to copy.
    jax.jit(lambda x: aj.migrate.owned.owned({"x": x}, {"x": x}))(fresh)
