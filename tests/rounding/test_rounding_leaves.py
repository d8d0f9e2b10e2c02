"""Stages that round change bfloat16 and float16 leaves only, and say where there is nothing to
round.

The oracle is the same leaf without them.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refused
from rounded import LINKS, f32

import adam_jax as aj


def mixed(seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return {
        "low": jnp.asarray(draw((3, 2)), jnp.bfloat16),
        "half": jnp.asarray(draw(3), jnp.float16),
        "f32": jnp.asarray(draw((2, 2)), jnp.float32),
        "f64": jnp.asarray(draw(2), jnp.float64),
        "z": jnp.asarray(draw(2) + 1j * draw(2), jnp.complex64),
        "i": jnp.arange(4, dtype=jnp.int32),
        "masked": optax.MaskedNode(),
        "none": None,
    }


WIDE = ("f32", "f64", "z")


@pytest.mark.parametrize("form", ["alone", "chained"])
def test_other_leaves_pass_bit_for_bit(link, form, x64):
    params, grads = mixed(0), {**mixed(1), "i": np.zeros(4, jax.dtypes.float0)}
    if form == "alone":
        expected, _ = grads, None
        found, _ = link.update(grads, link.init(params), params)
        assert found["i"] is grads["i"]
    else:
        plain, tx = aj.adam(0.1), aj.chain(aj.adam(0.1), link)
        expected, _ = plain.update(grads, plain.init(params), params)
        found, _ = tx.update(grads, tx.init(params), params)
        assert found["i"].dtype == params["i"].dtype
        np.testing.assert_array_equal(found["i"], np.zeros(4))
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for name in WIDE:
        assert found[name].dtype == params[name].dtype
        assert np.asarray(found[name]).tobytes() == np.asarray(expected[name]).tobytes()
    for name in ("low", "half"):
        assert found[name].dtype == jnp.float32
        moved = f32(params[name]) + f32(found[name])
        np.testing.assert_array_equal(moved, moved.astype(params[name].dtype).astype(np.float32))


def test_a_tree_without_narrow_leaves_has_nothing_to_do(link):
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    updates, _ = link.update(params, link.init(params), params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), updates, params))


def test_a_state_of_compensate_for_wide_parameters_is_named():
    """A11, the other way round: what was float32 in `init` has 16 bits now."""
    tx, wide = aj.compensate(), {"w": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16)}
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), wide)
    with refused(ValueError, "at 'w' found a parameter of bfloat16", "convert_state"):
        tx.update(params, tx.init(wide), params)
    state = aj.convert_state(tx.init(wide), tx, tx, params).state
    tx.update(params, state, params)


def test_nothing_to_round_is_said_once_in_init():
    """D15: of arrays, and neither of shapes nor of a group."""
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    for link, name in zip(LINKS.values(), ("round_stochastically", "compensate"), strict=True):
        tx = aj.chain(aj.adam(0.1), link)
        with pytest.warns(UserWarning, match=rf"^{name}\(\) rounds nothing: .* float32") as caught:
            tx.init(params)
        assert len(caught) == 1
        assert "warnings.filterwarnings" in str(caught[0].message)
        assert len(str(caught[0].message)) <= 600
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            aj.describe(tx, params)
            aj.state_bytes(tx, params)
            tx.init({"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3)})
            tx.init({"n": jnp.int32(1)})
            grouped = aj.by_path({"a": tx}, aj.adam(0.1))
            state = grouped.init(params)
            grouped.update(params, state, params)
