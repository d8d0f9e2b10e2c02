"""Whatever tree the parameters are: the state keeps its types, every leaf fares as it would alone, and dtypes stay their own.

The oracle is the same member on the same leaf, bare or in a plain list, unjitted.
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


def avals(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, jax.typeof(x).weak_type), tree)


def walk(tx, params, grads, steps=3, update=None):
    """Steps along gradients that grow: -> (params, updates, state). The state never changes its types."""
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


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_kind_of_tree_makes_no_difference(member, kind, agree):
    params = kind(draw((3, 2)), draw(3))
    grads = kind(draw((3, 2), seed=2), draw(3, seed=2))
    found, updates, _ = walk(member(0.1), params, grads)
    expected, _, _ = walk(member(0.1), jax.tree.leaves(params), jax.tree.leaves(grads))
    assert jax.tree.structure(found) == jax.tree.structure(updates) == jax.tree.structure(params)
    assert avals(found) == avals(params)
    agree(jax.tree.leaves(found), expected, rtol=1e-6)


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


def test_a_leaf_fares_as_it_would_alone_and_the_second_step_does_not_retrace(member, agree):
    tx, traces = member(0.1), []

    @jax.jit
    def update(grads, state, params):
        traces.append(grads)
        return tx.update(grads, state, params)

    grads = {name: draw(leaf.shape, leaf.dtype, seed=5) for name, leaf in LEAVES.items()}
    found, updates, _ = walk(tx, LEAVES, grads, update=update)
    assert len(traces) == 1
    assert avals(found) == avals(updates) == avals(LEAVES)
    for name, leaf in LEAVES.items():
        alone, _, _ = walk(tx, leaf, grads[name])
        half = leaf.dtype.itemsize == 2
        agree(*(x.astype(jnp.float32) if half else x for x in (found[name], alone)), rtol=1e-2 if half else 1e-5, atol=1e-6)


def test_an_integer_leaf_has_no_state_and_stays(member, agree):
    params = {"steps": jnp.arange(3), "w": draw(3), "on": jnp.asarray([True, False])}

    def loss(params):
        return jnp.sum(params["w"] ** 2)

    grads = jax.grad(loss, allow_int=True)(params)
    assert grads["steps"].dtype == grads["on"].dtype == jax.dtypes.float0
    found, updates, state = walk(member(0.1), params, grads)
    assert updates["steps"].dtype == params["steps"].dtype
    np.testing.assert_array_equal(found["steps"], params["steps"])
    np.testing.assert_array_equal(found["on"], params["on"])
    assert not any("steps" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
    agree(found["w"], walk(member(0.1), params["w"], grads["w"])[0], rtol=1e-6)
    jitted = jax.jit(lambda params: member(0.1).update(jax.grad(loss, allow_int=True)(params), member(0.1).init(params), params))
    np.testing.assert_array_equal(jitted(params)[0]["steps"], [0, 0, 0])


@pytest.mark.parametrize("precision", ["float32", "x64"])
def test_turning_a_complex_plane_turns_the_path(member, precision, request, agree):
    """ν sees |g|², so along a line through 0 at any angle a complex parameter goes the way of a real one."""
    if precision == "x64":
        request.getfixturevalue("x64")
    start = draw((3, 2), float)
    turn = jnp.exp(1j * jnp.asarray(0.7))
    real, complex_ = start, times(start, turn)
    tx = member(0.1)
    states = tx.init(real), tx.init(complex_)
    for _ in range(4):
        grads = (jax.grad(norm)(real), jnp.conj(jax.grad(norm)(complex_)))
        (step, turned), states = zip(*map(tx.update, grads, states, (real, complex_)), strict=True)
        real, complex_ = real + step, complex_ + turned
    assert complex_.dtype == turned.dtype == jnp.result_type(turn)
    assert norm(complex_) < norm(start)
    agree(complex_, times(real, turn), rtol=1e-4 if precision == "float32" else 1e-10, atol=1e-6)


def norm(z):
    return jnp.sum(jnp.real(z) ** 2 + jnp.imag(z) ** 2)


def times(real, turn):
    return jax.lax.complex(real * jnp.real(turn), real * jnp.imag(turn))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32_and_rounded_once(member, dtype):
    tx, params, grads = member(0.1), draw((3, 2), dtype), draw((3, 2), dtype, seed=3)
    state, wide_state = tx.init(params), tx.init(params.astype(jnp.float32))
    assert avals(state) == avals(wide_state)
    for i in range(1, 4):
        updates, state = tx.update(scale(i, grads), state, params)
        wide = scale(i, grads).astype(jnp.float32)
        expected, wide_state = tx.update(wide, wide_state, params.astype(jnp.float32))
        assert updates.dtype == dtype
        np.testing.assert_array_equal(updates, expected.astype(dtype))
        if dtype == jnp.bfloat16:  # gradients in float32, as of a loss that widens its parameters itself
            assert tx.update(wide, state, params)[0].dtype == jnp.float32


def test_x64_widens_float64_leaves_only(member, request, agree):
    values = np.random.default_rng(0).normal(size=(3, 2)).astype("f4")
    without, _, state = walk(member(0.1), jnp.asarray(values), jnp.asarray(values))
    request.getfixturevalue("x64")
    again, _, same = walk(member(0.1), jnp.asarray(values), jnp.asarray(values))
    assert avals(same) == avals(state)
    agree(again, without, rtol=1e-6)
    both = {"narrow": jnp.asarray(values), "wide": jnp.asarray(values, jnp.float64)}
    found, updates, state = walk(member(0.1), both, both)
    assert updates["narrow"].dtype == jnp.float32
    assert updates["wide"].dtype == jnp.float64
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == (jnp.float32 if "narrow" in jax.tree_util.keystr(path) else jnp.float64)
    agree(found["narrow"], without, rtol=1e-4)
    agree(found["wide"], np.asarray(without, "f8"), rtol=1e-4)


def test_weak_types_do_not_leak_into_the_state(member):
    tx, params = member(0.1), {"python": 1.5, "weak": jnp.asarray(1.5)}
    grads = jax.grad(lambda params: params["python"] ** 2 + params["weak"] ** 2)(params)
    state = tx.init(params)
    assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(state))
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert avals(after) == avals(state)
    np.testing.assert_array_equal(updates["python"], updates["weak"])


def test_a_thousand_leaves_are_one_array_in_pieces():
    values, grads = (np.random.default_rng(seed).normal(size=(1000, 3)).astype("f4") for seed in (0, 1))
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


@pytest.mark.parametrize("build", [adam_jax.scale_by_atan2, adam_jax.keep_maximum, adam_jax.center])
def test_a_shared_nu_fits_every_stage(build):
    middle = (build(),) if build is adam_jax.scale_by_atan2 else (build(), adam_jax.scale_by_moments())
    tx = adam_jax.chain(adam_jax.track_moments(blocks="output"), *middle, adam_jax.scale_by_learning_rate(0.1))
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
