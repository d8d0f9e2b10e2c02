"""Integer, complex, half and double precision leaves: how each is computed, and what gradients they
take.

The oracle is the same optimizer on a real float32 leaf.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUICKLY, avals
from tree_runs import MEMBERS, draw, scale

import adam_jax


def scanned(tx, params, grads, steps=3):
    """Steps along gradients that grow, in a scan: -> (params, updates, state).

    A scan refuses a state or parameters that change their types.
    """

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(jax.tree.map(functools.partial(scale, i), grads), state, params)
        return (optax.apply_updates(params, updates), state), updates

    (params, state), updates = jax.lax.scan(
        step, (params, tx.init(params)), jnp.arange(1, steps + 1)
    )
    return params, jax.tree.map(lambda each: each[-1], updates), state


def together(run):
    """By name:

    `run(tx)` of every member, all in one program, which compiles several times faster than one for
    each.
    """
    return jax.jit(
        lambda: {name: run(member(0.1)) for name, member in MEMBERS.items()},
        compiler_options=QUICKLY,
    )()


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


def test_numpy_float64_without_x64_is_float32():
    params = np.ones(3)
    tx = adam_jax.adam(0.1)
    updates, state = tx.update(params, tx.init(params), params)
    assert (updates.dtype, state[0].mu.dtype) == (jnp.float32, jnp.float32)


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
