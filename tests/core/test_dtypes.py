"""In which dtype updates leave: the wider of the gradient's and the parameter's.

The oracles are NumPy's and JAX's promotion, Optax, and small cases computed by hand.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import avals, normals, same
from typed_runs import BFLOAT16, FLOAT32, PARAMS, course, dtypes, gradients

import adam_jax as aj
from adam_jax._core.leaves import wider_dtype

DTYPES = ("bfloat16", "float16", "float32", "float64", "complex64", "complex128")
PAIRS = [
    (g, p)
    for g, p in itertools.product(DTYPES, DTYPES)
    if p.startswith("complex") or not g.startswith("complex")
]
"""Dtypes of a gradient and of its parameter. A real parameter has no complex gradient."""
KINDS = {
    "adam": aj.adam(0.1),
    "adamw": aj.adamw(0.1, weight_decay=0.1),
    "8bit": aj.adam(0.1, storage=aj.storage.Codes(smallest=0)),
    "ademamix": aj.ademamix(0.1),
    "amsgrad": aj.amsgrad(0.1),
    "lamb": aj.lamb(0.1),
    "nadamw": aj.nadamw(0.1),
    "adopt": aj.adopt(0.1),
    "rmsprop": aj.rmsprop(0.1, centered=True),
    "links": aj.chain(
        aj.adamw(0.1),
        aj.stages.cautious(),
        aj.stages.clip_update_rms(),
        aj.stages.average_parameters(0.9),
    ),
    "by_path": aj.by_path(
        {"bfloat16/.*": {"b1": 0.5}, "float32/.*": "frozen"}, default=aj.adamw(0.1)
    ),
    "skip_nonfinite": aj.skip_nonfinite(aj.adam(0.1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_leave_in_the_wider_dtype_and_states_keep_theirs(kind, x64):
    tx = KINDS[kind]
    params, grads = ({f"{g}/{p}": jnp.full(2, 0.5, (g, p)[i]) for g, p in PAIRS} for i in (1, 0))
    with jax.numpy_dtype_promotion("standard"):
        expected = {f"{g}/{p}": jnp.promote_types(g, p) for g, p in PAIRS}
    first = state = jax.eval_shape(tx.init, params)
    for _ in range(2):
        updates, state = jax.eval_shape(tx.update, grads, state, params)
        assert dtypes(updates) == expected
        assert types(state) == types(first)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def test_float64_gradients_are_computed_in_float64_and_stored_in_float32(x64):
    g, p = jnp.asarray([1 / 3, 1e-3]), jnp.ones(2, FLOAT32)
    tx = aj.momentum(0.5)
    updates, state = tx.update(g, tx.init(p), p)
    np.testing.assert_allclose(updates, -0.5 * g, rtol=1e-15)
    assert jax.tree.leaves(state[0].mu)[0].dtype == FLOAT32


def test_float32_gradients_of_float64_parameters_are_computed_in_float64(x64):
    p = jnp.asarray([1 / 3, -1e-3])
    low = [normals(2, seed=seed) for seed in range(3)]
    tx = aj.chain(aj.adamw(0.1, weight_decay=0.1), aj.stages.cautious())
    found = course(tx, p, jnp.stack(low))
    same(found, course(tx, p, jnp.stack(low).astype("float64")))


def test_without_parameters_updates_have_the_gradients_dtype(member):
    params = {"w": jnp.ones(2), "h": jnp.ones(2, BFLOAT16)}
    grads = {"w": jnp.ones(2, BFLOAT16), "h": jnp.ones(2)}
    tx = aj.chain(
        *(
            s
            for s in member(0.1).stages
            if s.init.spec.constructor
            not in (aj.add_decayed_weights, aj.stages.scale_by_trust_ratio)
        )
    )
    assert dtypes(tx.update(grads, tx.init(params))[0]) == dtypes(grads)


def test_an_update_by_hand():
    """0.1 in bfloat16 is 0.10009765625."""
    stage = aj.scale_by_learning_rate(0.1)
    for tx in (stage, optax.chain(stage), aj.chain(stage)):
        updates = tx.update(jnp.ones(1, BFLOAT16), tx.init(jnp.ones(1)), jnp.ones(1))[0]
        np.testing.assert_array_equal(updates, np.float32([-0.1]))
        updates = tx.update(
            jnp.ones(1, BFLOAT16), tx.init(jnp.ones(1, BFLOAT16)), jnp.ones(1, BFLOAT16)
        )[0]
        assert updates.dtype == BFLOAT16
        np.testing.assert_array_equal(updates.astype(FLOAT32), np.float32([-0.10009765625]))
    tx = aj.chain(aj.scale_by_learning_rate(0.1))
    updates = tx.update(jnp.ones(1), tx.init(jnp.ones(1, BFLOAT16)), jnp.ones(1, BFLOAT16))[0]
    np.testing.assert_array_equal(updates, np.float32([-0.1]))


def test_behind_other_stages_optax_chain_is_told_the_gradients_dtype():
    """A float32 update of a bfloat16 parameter does not tell what its gradient was: without it the
    parameter's dtype is taken.
    """
    tx = optax.chain(*aj.adam(0.1).stages)
    params = jnp.ones(2, BFLOAT16)
    for dtype, said in itertools.product((BFLOAT16, FLOAT32), (False, True)):
        g = jnp.ones(2, dtype)
        updates = tx.update(g, tx.init(params), params, **({"gradient": g} if said else {}))[0]
        assert updates.dtype == (dtype if said else BFLOAT16)
    g = jnp.ones(2)
    assert tx.update(g, tx.init(params), params, gradient={"another": g})[0].dtype == BFLOAT16


@pytest.mark.parametrize(
    "guard", [aj.skip_nonfinite, functools.partial(aj.skip_spikes, window=4, warmup=2)]
)
def test_a_skipped_step_has_the_updates_of_a_taken_one(guard):
    tx = guard(aj.chain(aj.adam(0.1), aj.stages.average_parameters(0.9)))
    grads = gradients(6)
    grads["w"] = grads["w"].at[4].set(jnp.nan)
    params, _, updates = course(tx, PARAMS, grads)
    assert dtypes(updates) == dtypes(params) == dtypes(PARAMS)
    np.testing.assert_array_equal(updates["w"][4], np.zeros((3, 2)))
    assert np.all(updates["w"][np.array([0, 1, 2, 3, 5])] != 0)


@pytest.mark.parametrize(
    "around", [lambda tx: tx, aj.chain, aj.skip_nonfinite], ids=["alone", "chain", "skip_nonfinite"]
)
def test_a_group_fares_as_it_would_alone(around):
    """The update of a leaf is the one that the leaf's own optimizer gives, and of a frozen leaf −0
    in the same dtype.
    """
    params = {
        "a": normals(3),
        "b": normals(3, seed=1),
        "h": normals(3, dtype=BFLOAT16),
        "z": normals(3, dtype=BFLOAT16),
    }
    grads = {
        "a": jnp.ones(3, BFLOAT16),
        "b": jnp.ones(3, BFLOAT16),
        "h": jnp.ones(3),
        "z": jnp.ones(3),
    }
    tx = around(aj.by_path({"a": aj.adam(0.1), "b|z": "frozen"}, aj.yogi(0.1)))
    updates = tx.update(grads, tx.init(params), params)[0]
    for name, alone in {
        "a": aj.adam(0.1),
        "b": aj.adam(0.1),
        "h": aj.yogi(0.1),
        "z": aj.yogi(0.1),
    }.items():
        expected = alone.update(grads[name], alone.init(params[name]), params[name])[0]
        same(updates[name], -jnp.zeros_like(expected) if name in "bz" else expected)


@pytest.mark.parametrize(
    "link", [aj.round_stochastically(), aj.compensate()], ids=["round_stochastically", "compensate"]
)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_links_that_round_keep_exact_updates(link, dtype, standard_promotion):
    params = {"h": normals(64, dtype=BFLOAT16), "w": normals(64)}
    grads = {name: normals(64, seed=3, dtype=dtype) for name in params}
    tx = aj.chain(aj.adam(1e-3), link)
    updates = tx.update(grads, tx.init(params), params)[0]
    assert dtypes(updates) == {"h": FLOAT32, "w": FLOAT32}
    exact = params["h"].astype(FLOAT32) + updates["h"]
    np.testing.assert_array_equal(exact, exact.astype(BFLOAT16).astype(FLOAT32))


AVERAGED = aj.chain(aj.adam(1e-3), aj.stages.average_parameters(0.5))
AROUND = {
    "chain": AVERAGED,
    "group": aj.by_path({"other": "frozen"}, AVERAGED),
    "group in a chain": aj.chain(aj.by_path({"other": "frozen"}, AVERAGED)),
}


@pytest.mark.parametrize("tx", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize(
    ("gradient", "param"), list(itertools.product(["bfloat16", "float16", "float32"], repeat=2))
)
def test_an_average_is_of_the_parameters_that_the_caller_holds(gradient, param, tx):
    params = {"w": normals(50, dtype=param), "other": jnp.ones(1)}
    state, path = tx.init(params), []
    for g in normals(5, 50, seed=1, dtype=gradient):
        updates, state = tx.update({"w": g, "other": jnp.ones(1)}, state, params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        path.append(np.asarray(params["w"].astype(FLOAT32), np.longdouble))
    weights = 0.5 ** np.arange(5)[::-1]
    expected = np.tensordot(weights / weights.sum(), np.stack(path), 1)
    np.testing.assert_allclose(
        aj.stages.averaged_parameters(state)["w"], expected.astype(float), rtol=1e-6
    )


def test_optax_has_the_same_dtypes(standard_promotion):
    for g, p in itertools.product((BFLOAT16, FLOAT32), (BFLOAT16, FLOAT32)):
        grads, params = jnp.ones(2, g), jnp.ones(2, p)
        ours, theirs = (
            tx.update(grads, tx.init(params), params)[0] for tx in (aj.adam(0.1), optax.adam(0.1))
        )
        assert ours.dtype == theirs.dtype == (BFLOAT16 if g == p == BFLOAT16 else FLOAT32)


@pytest.mark.parametrize("tx", [aj.adam(0.1), optax.adam(0.1)], ids=["ours", "optax"])
def test_apply_if_finite_chooses_where_gradients_have_the_parameters_dtype(tx, standard_promotion):
    """Its skipped step has the gradients' dtype, whatever it is around."""
    around = optax.apply_if_finite(tx, 3)
    for params in (jnp.ones(2), jnp.ones(2, BFLOAT16)):
        assert around.update(params, around.init(params), params)[0].dtype == params.dtype
    with pytest.raises(TypeError, match="bfloat16"):
        around.update(jnp.ones(2, BFLOAT16), around.init(jnp.ones(2)), jnp.ones(2))


def test_multi_steps_keeps_its_types(standard_promotion):
    tx = optax.MultiSteps(aj.adam(0.1), 2).gradient_transformation()
    _, state, updates = course(tx, PARAMS["w"], gradients(6)["w"])
    assert updates.dtype == FLOAT32
    np.testing.assert_array_equal(updates[::2], np.zeros((3, 3, 2)))
    assert avals(state) == avals(tx.init(PARAMS["w"]))


def test_the_wider_dtype_is_that_of_jax_also_under_strict_promotion(x64):
    for a, b in itertools.product(DTYPES, DTYPES):
        with jax.numpy_dtype_promotion("standard"):
            expected = jnp.promote_types(a, b)
        assert wider_dtype(jnp.ones(1, a), jnp.ones(1, b)) == expected
    eight = jnp.ones(1, jnp.float8_e4m3fn)
    assert wider_dtype(eight, eight) == jnp.float8_e4m3fn
    assert wider_dtype(eight, jnp.ones(1, BFLOAT16)) == FLOAT32
