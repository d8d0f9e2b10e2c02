"""Leaves of a frozen group keep every bit and have no state.

The oracle is the start, and the state of the other leaves alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grouped import DEFAULT, PARAMS, run, tree
from helpers import bits, same

import adam_jax as aj
from adam_jax import by_path

AVERAGED = lambda tx: aj.chain(tx, aj.stages.average_parameters(0.9))


@pytest.mark.parametrize(
    ("dtype", "around"),
    [
        (jnp.float32, lambda tx: tx),
        (jnp.bfloat16, AVERAGED),
        (jnp.complex64, AVERAGED),
        (jnp.bfloat16, aj.skip_nonfinite),
        (jnp.complex64, aj.skip_nonfinite),
    ],
    ids=["float32", "bfloat16 chain", "complex64 chain", "bfloat16 guard", "complex64 guard"],
)
def test_no_bit_of_a_frozen_leaf_changes(dtype, around):
    start = jnp.asarray([0.0, -0.0, 1.0, -1e-30, 3.0], dtype)
    params = {
        "a": start,
        "b": jnp.asarray(start, jnp.float32 if dtype == jnp.bfloat16 else dtype),
        "n": jnp.arange(3),
        "w": jnp.ones(2),
    }
    grads = {
        "a": jnp.full_like(start, 7),
        "b": jnp.full_like(params["b"], -7),
        "n": np.zeros(3, jax.dtypes.float0),
        "w": jnp.ones(2),
    }
    tx = around(by_path({"a|b|n": "frozen"}, aj.adamw(0.1)))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert bits(params["a"]) == bits(start)
    assert bits(params["b"]) == bits(jnp.asarray(start, params["b"].dtype))
    np.testing.assert_array_equal(params["n"], [0, 1, 2])
    assert updates["n"].dtype == jnp.int32
    assert bits(params["w"]) != bits(jnp.ones(2))


def test_frozen_leaves_have_no_state():
    frozen = by_path({"embed/.*|head/.*": "frozen"}, aj.adam(0.1))
    alone = {"encoder": PARAMS["encoder"]}
    assert aj.state_bytes(frozen, PARAMS).state == aj.state_bytes(aj.adam(0.1), alone).state
    assert len(jax.tree.leaves(frozen.init(PARAMS))) == len(
        jax.tree.leaves(aj.adam(0.1).init(alone))
    )
    everything = by_path({".*": "frozen"}, optax.sgd(0.1))
    assert jax.tree.leaves(everything.init(PARAMS)) == []
    same(run(everything, PARAMS, tree(1))[0], PARAMS)


def test_integer_leaves_outside_of_frozen_groups():
    params, grads = (
        {"n": jnp.arange(3), "w": jnp.ones(3)},
        {"n": np.zeros(3, jax.dtypes.float0), "w": jnp.ones(3)},
    )
    tx = by_path({"w": {"weight_decay": 0.0}}, aj.adamw(0.1))
    for given in (params, None):
        if given is None:
            tx = by_path({"n": "frozen"}, aj.adam(0.1))
        updates, _ = tx.update(grads, tx.init(params), given)
        assert updates["n"].dtype == (jnp.int32 if given else jax.dtypes.float0)
        np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)


def test_all_but_some_are_frozen():
    """A head on what was trained before."""
    tx, all_but = (
        by_path({"head/.*": DEFAULT}, "frozen"),
        by_path({"(embed|encoder)/.*": "frozen"}, DEFAULT),
    )
    (found, state), (expected, its) = (run(of, PARAMS, tree(1)) for of in (tx, all_but))
    same(found, expected)
    assert list(state.inner_states) == ["head/.*"]
    assert list(bits(state).values()) == list(bits(its).values())
    stages = {leaf.path: leaf.stages for leaf in aj.describe(tx, PARAMS).leaves}
    assert stages["embed/table"] == ("frozen",) != stages["head/kernel"]
    assert {name.rpartition("/")[0] for name in aj.observations(aj.observe(tx).init(PARAMS))} == {
        "",
        "all",
        "head/.*",
    }


def test_a_frozen_minus_zero_is_not_rounded_to_zero(standard_promotion):
    params = {"a": jnp.asarray([-0.0, 0.0, 1.0], jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
    for link in (aj.round_stochastically(), aj.compensate()):
        found, _ = run(
            aj.chain(by_path({"a": "frozen"}, aj.adam(0.1)), link),
            params,
            params,
            steps=2,
            jit=jax.jit,
        )
        assert bits(found["a"]) == bits(params["a"])
