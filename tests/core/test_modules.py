"""B3: a module of Equinox, functions among its leaves, goes wherever its arrays go.

The oracle is the same call with `eqx.filter(model, eqx.is_inexact_array)`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax as aj


class Model(eqx.Module):
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    activation: object
    count: jax.Array
    table: jax.Array

    def __init__(self):
        self.linear = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        self.dropout = eqx.nn.Dropout(0.5)
        self.activation = jax.nn.relu
        self.count = jnp.int32(3)
        self.table = np.ones((2, 2), np.float32)

    def __call__(self, x):
        return self.activation(self.linear(x)) @ self.table


def is_array(leaf):
    return isinstance(leaf, (jax.Array, np.ndarray))


MODEL = Model()
ARRAYS = eqx.filter(MODEL, eqx.is_inexact_array)
GRADIENTS = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), ARRAYS)

AROUND = {
    "adam": aj.adam(0.1),
    "adamw": aj.adamw(0.1, mask="matrices"),
    "lamb": aj.lamb(0.1, weight_decay=0.1),
    "mask": aj.adamw(0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    "by_path": aj.by_path({"linear/.*": {"b1": 0.8}, "table": "frozen"}, aj.adamw(0.1)),
    "skip_nonfinite": aj.skip_nonfinite(aj.adamw(0.1)),
    "skip_spikes": aj.skip_spikes(aj.adamw(0.1)),
    "observe": aj.observe(aj.adamw(0.1), every=1),
    "average": aj.chain(aj.adamw(0.1), aj.stages.average_parameters(0.9)),
    "rounded": aj.chain(aj.adamw(0.1, storage="8bit"), aj.compensate()),
    "optax.chain": optax.chain(optax.clip_by_global_norm(1.0), aj.adamw(0.1)),
    "inside": aj.chain(optax.clip_by_global_norm(1.0), aj.adamw(0.1)),
}


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.mark.parametrize("name", AROUND)
def test_a_whole_module_steps_as_its_arrays_do(name):
    tx = AROUND[name]
    step = eqx.filter_jit(tx.update)
    expected = step(GRADIENTS, tx.init(ARRAYS), ARRAYS)
    state = tx.init(MODEL)
    equal(state, tx.init(ARRAYS))
    found = step(GRADIENTS, state, MODEL)
    equal(found, expected)
    moved = aj.apply_updates(MODEL, found[0])
    assert moved.activation is MODEL.activation
    assert moved.dropout.p == 0.5
    equal(eqx.filter(moved, eqx.is_inexact_array), aj.apply_updates(ARRAYS, expected[0]))


@pytest.mark.parametrize("name", ["adamw", "by_path", "skip_nonfinite"])
def test_arrays_of_integers_may_stay_beside_gradients_that_have_none(name):
    """`eqx.filter(model, eqx.is_array)` keeps them, and `eqx.filter_grad` has `None` there."""
    tx, arrays = AROUND[name], eqx.filter(MODEL, is_array)
    updates, state = tx.update(GRADIENTS, tx.init(arrays), arrays)
    equal(updates, tx.update(GRADIENTS, tx.init(ARRAYS), ARRAYS)[0])
    tx.update(GRADIENTS, state, arrays)


def test_gradients_of_equinox_fit_the_module_that_they_are_of():
    gradients = eqx.filter_grad(lambda model: model(jnp.ones(2)).sum())(MODEL)
    tx = aj.adamw(0.1)
    updates, _ = tx.update(gradients, tx.init(MODEL), MODEL)
    assert updates.activation is None
    assert updates.linear.weight.shape == (2, 2)


def test_what_looks_at_parameters_takes_a_module():
    for tx in (AROUND["adamw"], AROUND["by_path"]):
        assert aj.describe(tx, MODEL) == aj.describe(tx, eqx.filter(MODEL, is_array))
        assert aj.state_bytes(tx, MODEL) == aj.state_bytes(tx, eqx.filter(MODEL, is_array))
    paths = [leaf.path for leaf in aj.describe(aj.adam(0.1), {"net": MODEL}).leaves]
    assert paths == ["net/linear/weight", "net/linear/bias", "net/count", "net/table"]


def test_what_moves_a_state_takes_a_module():
    tx, arrays = AROUND["adam"], eqx.filter(MODEL, is_array)
    state = tx.update(GRADIENTS, tx.init(MODEL), MODEL)[1]
    to = aj.amsgrad(0.1)
    equal(aj.convert_state(state, tx, to, MODEL), aj.convert_state(state, tx, to, arrays))
    theirs = optax.adam(0.1).init(arrays)
    moved = aj.migrate.from_optax(theirs, tx, MODEL)
    equal(moved, aj.migrate.from_optax(theirs, tx, arrays))
    spec = jax.sharding.PartitionSpec()
    everywhere = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), spec)
    each = (jax.tree.map(lambda _: everywhere, its) for its in (MODEL, arrays))
    for shardings in (everywhere, *each):
        assert aj.state_shardings(tx, MODEL, shardings) == aj.state_shardings(
            tx, arrays, everywhere
        )


def test_a_gradient_that_is_missing_is_still_an_error():
    """A trainable leaf is no setting, and outside of a module a number is trained."""
    half = eqx.tree_at(lambda g: g.table, GRADIENTS, None)
    decay = aj.add_decayed_weights(0.1)
    with pytest.raises(ValueError, match="leaves of params without a gradient: .table"):
        decay.update(half, decay.init(MODEL), MODEL)
    with pytest.raises(TypeError, match="found relu"):
        aj.adam(0.1).init({"w": jax.nn.relu})
    state = aj.adam(0.1).init({"w": 1.0})
    assert state[0].mu["w"].shape == ()
