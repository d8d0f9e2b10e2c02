"""`convert_state` carries every kind of leaf, reports what it did, and refuses what cannot be
converted.

The oracles are fresh states of the new optimizer and messages that are written out here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from before_convert import PARAMS, after, tree
from helpers import avals, refused, same

import adam_jax as aj
from adam_jax import storage


def test_leaves_of_all_kinds(x64):
    params = {
        "c": jnp.ones(3, jnp.complex64),
        "d": jnp.ones(3, jnp.float64),
        "e": jnp.ones((0, 3), jnp.float32),
        "h": jnp.ones(2, jnp.float16),
        "i": jnp.arange(3),
        "n": None,
        "s": jnp.ones((), jnp.float32),
        "m": optax.MaskedNode(),
    }
    grads = params | {"i": np.zeros(3, jax.dtypes.float0)}
    narrow = storage.Codes(smallest=0)
    old = aj.adam(0.1)
    state = jax.jit(lambda: old.update(grads, old.init(params), params)[1])()
    others = (
        aj.nadam(0.1, storage=narrow),
        aj.adabelief(0.1, storage=narrow),
        aj.adam_mini(0.1),
        aj.adopt(0.1),
    )
    convert = lambda state, new: aj.convert_state(state, old, new, params).state
    # Codes in one program, which otherwise are one for each operation and leaf.
    found = [
        *jax.jit(lambda: [convert(state, new) for new in others[:2]])(),
        *(convert(state, new) for new in others[2:]),
    ]
    for new, its in zip(others, found, strict=True):
        assert avals(its) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(new.init, params)
        )
    step = jax.jit(
        lambda states: [
            new.update(grads, its, params)[0] for new, its in zip(others, states, strict=True)
        ]
    )
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(step(found)))


def test_weights_of_each_leaf_are_carried_along():
    old = aj.adam(0.1)
    state = aj.reset(after(old), old, match=r"\['b'\]")
    txs = (
        aj.nadam(0.1),
        aj.radam(0.1, nesterov=True),
        aj.amsgrad(0.1, storage="8bit"),
        aj.adopt(0.1),
        aj.adabelief(0.1),
    )
    part, whole = (
        [aj.convert_state(its, old, new, PARAMS).state for new in txs]
        for its in (state, after(old))
    )
    step = jax.jit(
        lambda states: [
            new.update(tree(6), its, PARAMS) for new, its in zip(txs, states, strict=True)
        ]
    )
    for found, (ours, later), (theirs, _) in zip(part, step(part), step(whole), strict=True):
        assert avals(later) == avals(found)
        np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-5)
        assert not np.allclose(ours["b"], theirs["b"], rtol=1e-2)


def test_what_cannot_be_is_an_error():
    old, state = aj.adam(0.1), after(aj.adam(0.1))
    small = {"b": PARAMS["b"], "w": PARAMS["w"][:32]}
    with refused(TypeError, "from_tx", "expected a gradient transformation"):
        aj.convert_state(state, aj.adam, old, PARAMS)
    with refused(TypeError, "to_tx"):
        aj.convert_state(state, old, 0.1, PARAMS)
    with refused(
        ValueError,
        "[0].mu['w']",
        "float32[64, 80]",
        "float32[32, 80]",
        "Pass a state that from_tx made",
    ):
        aj.convert_state(state, old, old, small)
    with refused(ValueError, "[0].mu['w']", "float32[64, 80]", "bfloat16[64, 80]"):
        aj.convert_state(state, aj.adam(0.1, storage="bfloat16"), old, PARAMS)
    with refused(ValueError, "from_tx has [0].scales['mu_scale']", "the state does not"):
        aj.convert_state(state, aj.adam(0.1, storage="8bit"), old, PARAMS)
    with refused(ValueError, "from_tx: rmsprop(", "got the state of another transformation"):
        aj.convert_state(state, aj.rmsprop(0.1), old, PARAMS)
    with refused(ValueError, "from_tx", "from_optax(state, tx, params)"):
        aj.convert_state(optax.adam(0.1).init(PARAMS), old, old, PARAMS)
    with refused(ValueError, "to_tx of others", "to_optax(state, tx, like)"):
        aj.convert_state(state, old, optax.adam(0.1), PARAMS)
    with refused(ValueError, "structure"):
        aj.convert_state((*state, optax.EmptyState()), old, old, PARAMS)


def test_a_run_of_others_is_no_run_of_ours():
    theirs = optax.adam(0.1)
    with refused(ValueError, "found from_tx of others", "from_optax"):
        aj.convert_state(theirs.init(PARAMS), theirs, aj.adam(0.1), PARAMS)


def test_the_report_is_a_table():
    old, new = aj.adam(0.1), aj.adamax(0.1, storage="8bit")
    rows = str(aj.convert_state(after(old), old, new, PARAMS)).splitlines()
    assert [row.split()[:2] for row in rows] == [
        ["kept", "[0].mu"],
        ["fresh", "[0].nu"],
        ["dropped", "[0].nu"],
    ]
    assert rows[0].endswith("float32 → int8")
    assert "the mean of squared gradients" in rows[2]


def test_leaves_whose_joined_paths_are_equal_keep_their_own_moments():
    """E6."""
    params = {"a/b": jnp.ones(3), "a": {"b": jnp.zeros(3)}}
    old, new = aj.adam(0.1), aj.adamw(0.1)
    state = old.update(jax.tree.map(lambda p: p + 1, params), old.init(params), params)[1]
    found = aj.convert_state(state, old, new, params)
    assert not found.fresh
    same(found.state[0], state[0])


def test_a_group_without_trained_leaves_keeps_its_debias_factors():
    """E10."""
    params = {"n": jnp.zeros(3, jnp.int32), "w": jnp.ones(3)}
    grads = {"n": np.zeros(3, jax.dtypes.float0), "w": jnp.ones(3)}
    old, new = (aj.by_path({"n": make(0.1)}, make(0.1)) for make in (aj.adam, aj.adamw))
    state = old.init(params)
    for _ in range(3):
        state = old.update(grads, state, params)[1]
    found = aj.convert_state(state, old, new, params).state
    for group in ("n", "default"):
        same(found.inner_states[group][0], state.inner_states[group][0])
