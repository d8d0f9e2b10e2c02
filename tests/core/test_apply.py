"""`apply_updates`: the sum is Optax's, in the parameter's dtype, for every kind of tree.

The oracle is `optax.apply_updates` under standard dtype promotion.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax as aj

DTYPES = ["float32", "bfloat16", "float16", "complex64", "int32"]
PAIRS = [
    (param, update)
    for param in DTYPES
    for update in DTYPES
    if "int32" not in (param, update) or param == update
    if update != "complex64" or param == "complex64"
]


def test_it_gives_what_optax_gives():
    """B9: under strict promotion, which holds in these tests, Optax's cannot add float32 to
    bfloat16.
    """
    draw = np.random.default_rng(0).standard_normal((2, 50)) * 4
    params = {f"{p} + {u}": jnp.asarray(draw[0]).astype(p) for p, u in PAIRS}
    updates = {f"{p} + {u}": jnp.asarray(draw[1]).astype(u) for p, u in PAIRS}
    params |= {"none": None, "number": jnp.float32(2.0)}
    updates |= {"none": None, "number": jnp.float32(1.0)}
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.jit(optax.apply_updates)(params, updates)
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(aj.apply_updates)(params, updates)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name, value in jax.tree_util.tree_leaves_with_path(expected):
        (key,) = name
        assert found[key.key].dtype == value.dtype
        np.testing.assert_array_equal(found[key.key], value, err_msg=key.key)


def test_a_module_and_keys_stay_what_they_are():
    """B3, B9: functions, numbers that are no arrays, and typed keys are not added to."""
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    tree = {"model": model, "key": jax.random.key(1), "flag": True, "p": 0.5, "count": np.int32(3)}
    arrays = eqx.filter(model, eqx.is_inexact_array)
    zero = np.zeros((), jax.dtypes.float0)
    updates = {"model": arrays, "key": zero, "flag": None, "p": None, "count": zero}
    moved = aj.apply_updates(tree, updates)
    assert moved["model"].activation is model.activation
    assert (moved["flag"], moved["p"], moved["count"]) == (True, 0.5, 3)
    assert moved["key"] is tree["key"]
    doubled = jax.tree.map(lambda x: 2 * x, arrays)
    same = jax.tree.map(np.array_equal, eqx.filter(moved["model"], eqx.is_array), doubled)
    assert jax.tree.all(same)


def test_an_update_of_another_shape_is_refused():
    """Optax's broadcasts, and the parameter has another shape."""
    with pytest.raises(ValueError, match=r"\['w'\]: \(3,\) for \(2, 3\)"):
        aj.apply_updates({"w": jnp.ones((2, 3))}, {"w": jnp.ones(3)})
