"""Whatever tree the parameters are: every leaf fares as it would alone, and the state keeps its
types.

The oracle is the same optimizer on the same leaf, bare or in a plain list.
"""

import functools
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUICKLY, avals
from tree_runs import MEMBERS, draw, scale

import adam_jax


class Pair(NamedTuple):
    b: Any
    a: Any


@chex.dataclass
class ChexPair:
    b: Any
    a: Any


@flax.struct.dataclass
class FlaxPair:
    b: Any
    a: Any


class EquinoxPair(eqx.Module):
    b: Any
    a: Any


KINDS = {
    "bare": lambda x, y: x,
    "dict_out_of_order": lambda x, y: {"z": x, "a": y},
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "nested": lambda x, y: {"a": [(x,), {"b": y}], "empty": {}, "none": [None]},
    "NamedTuple": Pair,
    "chex_dataclass": lambda x, y: ChexPair(b=x, a=y),
    "flax_dataclass": FlaxPair,
    "equinox_module": EquinoxPair,
    "None": lambda x, y: {"a": None, "b": x, "c": [None, y]},
    "MaskedNode": lambda x, y: {"a": optax.MaskedNode(), "b": x, "c": (optax.MaskedNode(), y)},
    "empty_dict": lambda x, y: {},
    "empty_list": lambda x, y: [],
    "only_None": lambda x, y: [None],
    "only_MaskedNode": lambda x, y: (optax.MaskedNode(),),
}


def walk(tx, params, grads, steps=3, update=None):
    """Steps along gradients that grow: -> (params, updates, state).

    The state never changes its types.
    """
    state = tx.init(params)
    expected = avals(jax.eval_shape(tx.init, params))
    for i in range(1, steps + 1):
        assert avals(state) == expected
        scaled = jax.tree.map(functools.partial(scale, i), grads)
        updates, state = (update or tx.update)(scaled, state, params)
        params = optax.apply_updates(params, updates)
    assert avals(state) == expected
    return params, updates, state


# A quarter of all pairs: every member meets three or four kinds, and every kind four or five
# members.
PAIRS = [(name, kind) for i, name in enumerate(MEMBERS) for kind in list(KINDS)[i % 4 :: 4]]


@functools.cache
def listed(name, shapes):
    """Parameters after a run with leaves of these shapes in a list."""
    params, grads = ([draw(shape, seed=seed) for shape in shapes] for seed in (0, 2))
    return walk(MEMBERS[name](0.1), params, grads)[0]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_kind_of_tree_makes_no_difference(name, kind, agree):
    params, grads = (KINDS[kind](draw((3, 2), seed=seed), draw(3, seed=seed)) for seed in (0, 2))
    found, updates, _ = walk(MEMBERS[name](0.1), params, grads)
    assert jax.tree.structure(found) == jax.tree.structure(updates) == jax.tree.structure(params)
    assert avals(found) == avals(params)
    agree(
        jax.tree.leaves(found),
        listed(name, tuple(leaf.shape for leaf in jax.tree.leaves(params))),
        rtol=1e-6,
    )


LEAVES = {
    "matrix": draw((3, 2)),
    "scalar": draw(()),
    "one_element": draw(1),
    "no_elements": draw(0),
    "no_columns": draw((3, 0)),
    "bfloat16": draw((2, 3), jnp.bfloat16),
    "float16": draw((2, 3), jnp.float16),
    "complex64": draw((2, 3), jnp.complex64),
    "four_dimensions": draw((1, 2, 1, 3)),
}


@functools.cache
def fares():
    """How often a step of all members was traced for three steps; by member: the leaves in one
    tree, and some alone.

    They are a third for each member: every leaf is alone with five or six members.
    """
    lone = {name: list(LEAVES)[i % 3 :: 3] for i, name in enumerate(MEMBERS)}
    grads, traces = (
        {name: draw(leaf.shape, leaf.dtype, seed=5) for name, leaf in LEAVES.items()},
        [],
    )
    txs = {name: member(0.1) for name, member in MEMBERS.items()}

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def step(grads, params, states):
        traces.append(grads)

        def move(tx, grads, params, state):
            updates, state = tx.update(grads, state, params)
            return {
                "params": optax.apply_updates(params, updates),
                "updates": updates,
                "state": state,
            }

        return {
            name: {
                "tree": move(tx, grads, params[name]["tree"], states[name]["tree"]),
                "alone": {
                    leaf: move(tx, grads[leaf], params[name][leaf], states[name][leaf])
                    for leaf in lone[name]
                },
            }
            for name, tx in txs.items()
        }

    params = {name: {"tree": LEAVES, **{leaf: LEAVES[leaf] for leaf in lone[name]}} for name in txs}
    states = {
        name: {part: txs[name].init(its) for part, its in parts.items()}
        for name, parts in params.items()
    }
    types = avals(states)
    for i in range(1, 4):
        found = step({name: scale(i, grad) for name, grad in grads.items()}, params, states)
        each = {name: {"tree": its["tree"], **its["alone"]} for name, its in found.items()}
        params, states = (
            {name: {leaf: of[part] for leaf, of in its.items()} for name, its in each.items()}
            for part in ("params", "state")
        )
        assert avals(states) == types
    return len(traces), found


def test_a_leaf_fares_as_it_would_alone_and_the_second_step_does_not_retrace(member, agree):
    traces, found = fares()
    assert traces == 1
    tree, alone = (found[member.__name__][which] for which in ("tree", "alone"))
    assert avals(tree["params"]) == avals(tree["updates"]) == avals(LEAVES)
    for name, its in alone.items():
        pair = tree["params"][name], its["params"]
        half = LEAVES[name].dtype.itemsize == 2
        agree(
            *(x.astype(np.float32) if half else x for x in pair),
            rtol=1e-2 if half else 1e-5,
            atol=1e-6,
        )


@functools.cache
def weak():
    """By member: the state from weakly typed parameters, and what a jitted step makes of it."""
    params, txs = (
        {"python": 1.5, "weak": jnp.asarray(1.5)},
        {name: member(0.1) for name, member in MEMBERS.items()},
    )
    grads = jax.grad(lambda params: params["python"] ** 2 + params["weak"] ** 2)(params)
    states = {name: tx.init(params) for name, tx in txs.items()}

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def step(grads, states, params):
        return {name: tx.update(grads, states[name], params) for name, tx in txs.items()}

    return states, step(grads, states, params)


def test_weak_types_do_not_leak_into_the_state(member):
    states, after = weak()
    state, (updates, after) = states[member.__name__], after[member.__name__]
    assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(state))
    assert avals(after) == avals(state)
    np.testing.assert_array_equal(updates["python"], updates["weak"])


def test_hundreds_of_leaves_are_one_array_in_pieces():
    values, grads = (
        np.random.default_rng(seed).normal(size=(300, 3)).astype("f4") for seed in (0, 1)
    )
    tx = adam_jax.adam(0.1)
    many = {f"{i:04}": row for i, row in enumerate(values)}
    state, update = tx.init(many), jax.jit(tx.update)
    whole, whole_state = values, tx.init(values)
    for i in range(1, 3):
        updates, state = update({f"{k:04}": i * row for k, row in enumerate(grads)}, state, many)
        many = {name: row + np.asarray(updates[name]) for name, row in many.items()}
        updates, whole_state = tx.update(i * grads, whole_state, whole)
        whole = whole + np.asarray(updates)
    np.testing.assert_allclose(np.stack(list(many.values())), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "build", [adam_jax.stages.scale_by_atan2, adam_jax.stages.keep_maximum, adam_jax.stages.center]
)
def test_a_shared_nu_fits_every_stage(build):
    middle = (
        (build(),)
        if build is adam_jax.stages.scale_by_atan2
        else (build(), adam_jax.scale_by_moments())
    )
    tx = adam_jax.chain(
        adam_jax.track_moments(blocks="output"), *middle, adam_jax.scale_by_learning_rate(0.1)
    )
    params = jnp.ones((3, 2))
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
    assert updates.shape == (3, 2)
    assert np.isfinite(updates).all()
