"""Whatever tree the parameters are: the state keeps its types, every leaf fares as it would alone,
and dtypes stay their own.

The oracle is the same member on the same leaf, bare or in a plain list.
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


def draw(shape, dtype=jnp.float32, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1j * np.random.default_rng(seed + 1).normal(size=shape)
    return jnp.asarray(values, dtype)


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


def scale(factor, leaf):
    return leaf if leaf.dtype == jax.dtypes.float0 else leaf * jnp.asarray(factor, leaf.dtype)


def scanned(tx, params, grads, steps=3):
    """The same in a scan, which refuses a state or parameters that change their types."""

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(jax.tree.map(functools.partial(scale, i), grads), state, params)
        return (optax.apply_updates(params, updates), state), updates

    (params, state), updates = jax.lax.scan(
        step, (params, tx.init(params)), jnp.arange(1, steps + 1)
    )
    return params, jax.tree.map(lambda each: each[-1], updates), state


MEMBERS = {name: getattr(adam_jax, name) for name in adam_jax.family.__all__}


def together(run):
    """By name:

    `run(tx)` of every member, all in one program, which compiles several times faster than one for
    each.
    """
    return jax.jit(
        lambda: {name: run(member(0.1)) for name, member in MEMBERS.items()},
        compiler_options=QUICKLY,
    )()


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


INTEGERS = {"steps": jnp.arange(3), "w": draw(3), "on": jnp.asarray([True, False])}


@functools.cache
def beside_integers():
    """By member: a run with integers in the tree, and one with `w` alone."""
    grads = jax.grad(lambda params: jnp.sum(params["w"] ** 2), allow_int=True)(INTEGERS)
    assert grads["steps"].dtype == grads["on"].dtype == jax.dtypes.float0
    return together(
        lambda tx: (scanned(tx, INTEGERS, grads), scanned(tx, INTEGERS["w"], grads["w"]))
    )


def test_an_integer_leaf_has_no_state_and_stays(member, agree):
    (found, updates, state), (alone, _, _) = beside_integers()[member.__name__]
    assert updates["steps"].dtype == INTEGERS["steps"].dtype
    np.testing.assert_array_equal(updates["steps"], [0, 0, 0])
    np.testing.assert_array_equal(found["steps"], INTEGERS["steps"])
    np.testing.assert_array_equal(found["on"], INTEGERS["on"])
    assert not any(
        "steps" in jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    )
    agree(found["w"], alone, rtol=1e-6)


@functools.cache
def turned(precision):
    """By member: a complex parameter and a real one after four steps, and the complex one's last
    step.
    """
    start = draw((3, 2), float)
    turn = jnp.exp(1j * jnp.asarray(0.7))

    def run(tx):
        real, complex_ = start, times(start, turn)
        states = tx.init(real), tx.init(complex_)

        def body(carry, _):
            real, complex_, states = carry
            grads = (jax.grad(norm)(real), jnp.conj(jax.grad(norm)(complex_)))
            (step, turned), states = zip(
                *map(tx.update, grads, states, (real, complex_)), strict=True
            )
            return (real + step, complex_ + turned, states), turned

        (real, complex_, _), steps = jax.lax.scan(body, (real, complex_, states), length=4)
        return complex_, times(real, turn), steps[-1], norm(complex_) < norm(start)

    return together(run)


@pytest.mark.parametrize("precision", ["float32", "x64"])
def test_turning_a_complex_plane_turns_the_path(member, precision, request, agree):
    """ν sees |g|², so along a line through 0 at any angle a complex parameter goes the way of a
    real one.
    """
    if precision == "x64":
        request.getfixturevalue("x64")
    found, expected, step, closer = turned(precision)[member.__name__]
    assert (
        found.dtype == step.dtype == (jnp.complex64 if precision == "float32" else jnp.complex128)
    )
    assert closer
    agree(found, expected, rtol=1e-4 if precision == "float32" else 1e-10, atol=1e-6)


def norm(z):
    return jnp.sum(jnp.real(z) ** 2 + jnp.imag(z) ** 2)


def times(real, turn):
    return jax.lax.complex(real * jnp.real(turn), real * jnp.imag(turn))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32_and_rounded_once(member, dtype):
    tx, params = member(0.1), draw((3, 2), dtype)
    state, wide_state = tx.init(params), tx.init(params.astype(jnp.float32))
    assert avals(state) == avals(wide_state)
    for i in range(1, 9):
        grads = draw((3, 2), dtype, seed=2 + i)
        updates, state = tx.update(grads, state, params)
        wide = grads.astype(jnp.float32)
        expected, wide_state = tx.update(wide, wide_state, params.astype(jnp.float32))
        assert updates.dtype == dtype
        np.testing.assert_array_equal(updates, expected.astype(dtype))
    if (
        dtype == jnp.bfloat16
    ):  # gradients in float32, as of a loss that widens its parameters itself
        assert tx.update(wide, state, params)[0].dtype == jnp.float32


VALUES = np.random.default_rng(0).normal(size=(3, 2)).astype("f4")


@functools.cache
def narrow_runs():
    return together(lambda tx: scanned(tx, jnp.asarray(VALUES), jnp.asarray(VALUES)))


@functools.cache
def runs_in_x64():
    """By member, to be called with x64: a run of a float32 leaf, and one of it beside a float64
    leaf.
    """
    both = {"narrow": jnp.asarray(VALUES), "wide": jnp.asarray(VALUES, jnp.float64)}
    return together(
        lambda tx: (scanned(tx, both["narrow"], both["narrow"]), scanned(tx, both, both))
    )


def test_x64_widens_float64_leaves_only(member, request, agree):
    without, _, state = narrow_runs()[member.__name__]
    request.getfixturevalue("x64")
    (again, _, same), (found, updates, both) = runs_in_x64()[member.__name__]
    assert avals(same) == avals(state)
    agree(again, without, rtol=1e-6)
    assert updates["narrow"].dtype == jnp.float32
    assert updates["wide"].dtype == jnp.float64
    for path, leaf in jax.tree_util.tree_leaves_with_path(both):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == (
                jnp.float32 if "narrow" in jax.tree_util.keystr(path) else jnp.float64
            )
    agree(found["narrow"], without, rtol=1e-4)
    agree(found["wide"], np.asarray(without, "f8"), rtol=1e-4)


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


def test_an_integer_gradient_moves_no_integer():
    params = {"w": jnp.ones(2), "i": jnp.arange(2)}
    tx = adam_jax.adam(0.1)
    for given in (params, None):
        updates, _ = tx.update({"w": jnp.ones(2), "i": jnp.array([5, 7])}, tx.init(params), given)
        np.testing.assert_array_equal(optax.apply_updates(params, updates)["i"], [0, 1])


def test_a_complex_leaf_stays_wide_where_mu_is_narrow():
    params = {"c": jnp.ones(3, jnp.complex64), "w": jnp.ones(3)}
    mu = adam_jax.adam(0.1, mu_dtype=jnp.bfloat16).init(params)[0].mu
    assert (mu["c"].dtype, mu["w"].dtype) == (jnp.complex64, jnp.bfloat16)


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


def test_numpy_float64_without_x64_is_float32():
    params = np.ones(3)
    tx = adam_jax.adam(0.1)
    updates, state = tx.update(params, tx.init(params), params)
    assert (updates.dtype, state[0].mu.dtype) == (jnp.float32, jnp.float32)


# Gradients of other kinds


def test_gradients_that_are_none_of_their_parameters():
    """D6, D7, and B9's empty path."""
    tx = adam_jax.adam(0.1)
    for param, grad, says in [
        (jnp.ones(3), jnp.ones(3, jnp.complex64), "of complex64 for a parameter of float32"),
        (jnp.ones(3, jnp.int32), jnp.ones(3), "of float32 for a parameter of int32"),
    ]:
        for of in (lambda x: x, lambda x: {"w": x}):
            params = of(param)
            with pytest.raises(ValueError, match=says):
                jax.jit(tx.update)(of(grad), tx.init(params), params)
    with pytest.raises(
        ValueError, match=r"^the gradient has shape \(4,\), but mu has shape \(3,\)"
    ):
        tx.update(jnp.ones(4), tx.init(jnp.ones(3)))


def test_a_complex_dtype_for_the_mu_of_complex_parameters():
    """B8: Optax takes it."""
    params = jnp.ones(3, jnp.complex64)
    tx, theirs = adam_jax.adam(0.1, mu_dtype=jnp.complex64), optax.adam(0.1, mu_dtype=jnp.complex64)
    assert tx.init(params)[0].mu.dtype == theirs.init(params)[0].mu.dtype == jnp.complex64
