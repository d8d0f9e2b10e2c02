"""`from_optax` finds moments of every storage and every kind of leaf, wherever the state is.

The oracle is the state of Optax itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normals, refused, same
from optax_states import LARGE, RATE, steps_of

import adam_jax as aj
from adam_jax import storage


@pytest.mark.parametrize("form", ["bfloat16", ("8bit", storage.Float(jnp.float16))])
def test_moments_are_rounded_to_the_storage_as_in_a_conversion(form):
    state, wide, tx = (
        steps_of(optax.amsgrad(1e-3), LARGE),
        aj.amsgrad(1e-3),
        aj.amsgrad(1e-3, storage=form),
    )
    moved = aj.migrate.from_optax(state, tx, LARGE)
    same(moved, aj.convert_state(aj.migrate.from_optax(state, wide, LARGE), wide, tx, LARGE).state)
    back = aj.migrate.to_optax(moved, tx, state)
    np.testing.assert_allclose(back[0].mu["w"], state[0].mu["w"], rtol=2**-4, atol=1e-2)
    assert back[0].mu["w"].dtype == jnp.float32
    same(back[0].mu["b"], state[0].mu["b"])  # too small to be narrowed


def test_narrow_moments_of_optax_are_widened_and_come_back_the_same():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), LARGE)
    for theirs, its in [
        (optax.adam(1e-3, mu_dtype=jnp.bfloat16), LARGE),
        (optax.adam(1e-3), params),
    ]:
        state, tx = steps_of(theirs, its), aj.adam(1e-3)
        moved = aj.migrate.from_optax(state, tx, its)
        assert moved[0].mu["w"].dtype == moved[0].nu["w"].dtype == jnp.float32
        np.testing.assert_array_equal(moved[0].mu["w"], state[0].mu["w"].astype(jnp.float32))
        same(aj.migrate.to_optax(moved, tx, state), state)


def test_leaves_of_every_kind():
    params = {
        "z": jnp.ones(3, jnp.complex64),
        "n": jnp.ones(2, jnp.int32),
        "none": None,
        "x": jnp.ones(2),
    }
    theirs, tx = optax.adam(1e-3), aj.adam(1e-3)
    state = theirs.init(params)
    fill = lambda x: (x + 1 if jnp.iscomplexobj(x) else x + 2).astype(x.dtype)
    state = (
        state[0]._replace(
            count=jnp.int32(7),
            mu=jax.tree.map(fill, state[0].mu),
            nu=jax.tree.map(fill, state[0].nu),
        ),
        state[1],
    )
    moved = aj.migrate.from_optax(state, tx, params)
    assert jax.tree.structure(moved) == jax.tree.structure(tx.init(params))
    assert moved[0].nu["z"].dtype == jnp.float32
    assert moved[0].nu["n"] is None
    back = aj.migrate.to_optax(moved, tx, state)
    same(back, state)


@pytest.mark.usefixtures("standard_promotion")  # Optax's schedules mix dtypes
def test_found_inside_of_wrappers():
    chained = optax.chain(optax.clip(1.0), optax.adam(RATE))
    ours = aj.skip_nonfinite(aj.chain(optax.clip(1.0), aj.adam(RATE)))
    for theirs in [
        optax.apply_if_finite(optax.adam(RATE), 3),
        optax.inject_hyperparams(optax.adam)(RATE),
        optax.with_extra_args_support(optax.adam(RATE)),
    ]:
        state = steps_of(theirs, LARGE)
        plain = aj.migrate.from_optax(getattr(state, "inner_state", state), aj.adam(RATE), LARGE)
        same(aj.migrate.from_optax(state, aj.adam(RATE), LARGE), plain)
        assert int(plain[0].count) == int(plain[3].step) == 5
        np.testing.assert_array_equal(plain[0].mu["w"], optax.tree.get(state, "mu")["w"])
        back = aj.migrate.to_optax(plain, aj.adam(RATE), state)
        # The last bit of a recorded rate depends on how its schedule was compiled.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-7), back, state)
    state = steps_of(chained, LARGE)
    moved = aj.migrate.from_optax(state, ours, LARGE)
    assert int(moved.inner_state[1][3].step) == int(moved.inner_state[1][0].count) == 5
    same(aj.migrate.to_optax(moved, ours, chained.init(LARGE)), state)


def test_an_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    pure = getattr(nnx, "as_pure", None) or nnx.pure
    model, tx = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), aj.adam(RATE)
    old = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)

    @nnx.jit
    def update(optimizer, model):
        optimizer.update(model, nnx.grad(lambda model: (model(jnp.ones((4, 2))) ** 2).sum())(model))

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            update(old, model)
        new = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for state in (old.opt_state, pure(old.opt_state)):
            moved = aj.migrate.from_optax(state, tx, nnx.state(model, nnx.Param))
            nnx.update(new.opt_state, nnx.state(moved))
            assert int(new.opt_state[0].count[...]) == int(new.opt_state[3].step[...]) == 3
            new.step[...] = old.step[...]  # B12: Flax counts as well, and began at 0
            assert int(new.step[...]) == 3
            np.testing.assert_array_equal(
                new.opt_state[0].mu["kernel"][...], old.opt_state[0].mu["kernel"][...]
            )
        update(new, model)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("taken", [3, 4])
def test_accumulated_gradients_move_with_multi_steps(taken):
    """B12: `tx=MultiSteps(ours)` was a TypeError, and the lines that work were nowhere."""
    params = {"w": jnp.ones((2, 3))}
    theirs = optax.MultiSteps(optax.adamw(RATE), 2)
    ours = optax.MultiSteps(aj.adamw(RATE), 2)
    state = theirs.init(params)
    grads = [normals(2, 3, seed=i) for i in range(8)]
    for g in grads[:taken]:
        _, state = theirs.update({"w": g}, state, params)
    moved = aj.migrate.from_optax(state, ours, params)
    inner = aj.migrate.from_optax(state.inner_opt_state, ours.inner_opt, params)
    same(moved, state._replace(inner_opt_state=inner))
    for g in grads[taken:]:
        expected, state = theirs.update({"w": g}, state, params)
        found, moved = ours.update({"w": g}, moved, params)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-4, atol=1e-8)
    with refused(ValueError, "a tx without it", "tx=optax.MultiSteps(tx", "inner_opt_state"):
        aj.migrate.from_optax(state, aj.adamw(RATE), params)
    with refused(ValueError, "expected one of MultiSteps", "_replace(inner_opt_state=state)"):
        aj.migrate.from_optax(state.inner_opt_state, ours, params)


def test_masked_leaves_are_frozen():
    theirs = optax.masked(optax.adam(1e-3), {"w": True, "b": False})
    tx = aj.by_path({"b": "frozen"}, aj.adam(1e-3))
    state = steps_of(theirs, LARGE)
    moved = aj.migrate.from_optax(state, tx, LARGE)
    np.testing.assert_array_equal(
        moved.inner_states["default"][0].mu["w"], state.inner_state[0].mu["w"]
    )
    same(aj.migrate.to_optax(moved, tx, theirs.init(LARGE)), state)
    with refused(ValueError, "to_optax: like: missing b; left over w"):
        aj.migrate.to_optax(
            moved, tx, optax.masked(optax.adam(1e-3), {"w": False, "b": True}).init(LARGE)
        )


def test_wrappers_with_arrays_of_their_own_give_the_state_inside():
    tx = aj.adam(1e-3)
    several = steps_of(optax.MultiSteps(optax.adam(1e-3), 2), LARGE, 6)
    with refused(ValueError, "the state of optax.MultiSteps", "state.inner_opt_state"):
        aj.migrate.from_optax(several, tx, LARGE)
    assert int(aj.migrate.from_optax(several.inner_opt_state, tx, LARGE)[0].count) == 3

    masked = steps_of(optax.masked(optax.adam(1e-3), {"w": True, "b": False}), LARGE)
    with refused(ValueError, "missing b", "the parameters that were trained"):
        aj.migrate.from_optax(masked, tx, LARGE)
    inside = {"w": LARGE["w"], "b": optax.MaskedNode()}
    assert jax.tree.structure(aj.migrate.from_optax(masked, tx, inside)) == jax.tree.structure(
        tx.init(inside)
    )

    groups = steps_of(
        optax.partition({"a": optax.adam(1e-3), "b": optax.sgd(1e-3, 0.9)}, {"w": "a", "b": "b"}),
        LARGE,
    )
    with refused(ValueError, "tx has not", "a sum of gradients (.inner_states['b']"):
        aj.migrate.from_optax(groups, tx, LARGE)
    aj.migrate.from_optax(groups.inner_states["a"], tx, inside)
