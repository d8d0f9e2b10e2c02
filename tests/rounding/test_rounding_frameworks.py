"""bfloat16 models of Flax and Equinox are rounded as a plain tree is, and keep their dtype.

The oracle is the sum of each step, rounded by NumPy.
"""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import refused
from jax import lax
from rounded import LINKS, bits, check_path, descent, f32, grads_of, small_params

import adam_jax as aj


def test_flax_train_state(link, standard_promotion):
    params = small_params()
    state = TrainState.create(apply_fn=None, params=params, tx=descent(link))
    grads, path = grads_of(params, 8), [params["w"]]
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for g in grads:
        state = step(state, g)
        path.append(state.params["w"])
    check_path(link, path, [g["w"] for g in grads])


def test_flax_linen_model_in_bfloat16(link, standard_promotion):
    """With gradients of its own, and a member in front: a model that would stand still learns."""
    model = nn.Dense(4, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((32, 8)), jnp.bfloat16)
    start = model.init(jax.random.key(0), x)

    def run(*links):
        def loss(params):
            return jnp.mean((model.apply(params, x).astype(jnp.float32) - 10) ** 2)

        def step(state, _):
            return state.apply_gradients(grads=jax.grad(loss)(state.params)), None

        state = TrainState.create(
            apply_fn=model.apply, params=start, tx=aj.chain(aj.adam(1e-4), *links)
        )
        return jax.jit(lambda s: lax.scan(step, s, None, length=200)[0].params["params"]["kernel"])(
            state
        )

    kernel = f32(start["params"]["kernel"])
    plain, linked = (np.abs(f32(run(*links)) - kernel).mean() for links in ((), (link,)))
    assert linked > 0.01  # of the 0.02 that 200 steps of 1e-4 can do
    assert linked > 3 * plain


def test_nnx_optimizer(link, standard_promotion):
    model = nnx.Linear(8, 6, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, descent(link), wrt=nnx.Param)
    path, grads = [jnp.copy(model.kernel[...])], []

    @nnx.jit
    def step(model, optimizer, x):
        g = nnx.grad(lambda model: jnp.sum(model(x).astype(jnp.float32) * 2.0**-6))(model)
        optimizer.update(model, g)
        return g.kernel[...]

    for x in np.random.default_rng(0).standard_normal((8, 3, 8)):
        grads.append(step(model, optimizer, jnp.asarray(x, jnp.bfloat16)))
        path.append(jnp.copy(model.kernel[...]))
    check_path(link, path, grads)


def test_equinox_keeps_its_dtype(link):
    """A11: for three steps, behind `compensate` those of a plain list of the module's arrays."""
    tx = aj.chain(aj.adam(0.1), link)
    start = eqx.nn.MLP(2, 2, 4, 1, dtype=jnp.bfloat16, key=jax.random.key(0))
    arrays = jax.tree.leaves(eqx.filter(start, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(params, state, params)
        return aj.apply_updates(model, updates), state

    def run(model, state):
        for _ in range(3):
            model, state = step(model, state)
        return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))

    found = run(start, tx.init(eqx.filter(start, eqx.is_inexact_array)))
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.bfloat16)}
    assert not any((a == b).all() for a, b in zip(found, arrays, strict=True) if b.any())
    if link == LINKS["compensate"]:  # the random bits of the other depend on the leaves' names
        for a, b in zip(found, run(arrays, tx.init(arrays)), strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("add", [eqx.apply_updates, functools.partial(jax.tree.map, jnp.add)])
def test_a_sum_that_was_not_cast_back_is_named(link, add, standard_promotion):
    """A11: the second step says what to call. Silence would be a run in float32."""
    tx = aj.chain(aj.adam(0.1), link)
    params = {"w": jnp.ones(3, jnp.bfloat16), "n": jnp.ones(3)}
    updates, state = tx.update(params, tx.init(params), params)
    params = add(params, updates)
    assert params["w"].dtype == jnp.float32
    if link == LINKS["compensate"]:
        with refused(
            ValueError,
            "compensate(): at 'w' found a parameter of float32; expected bfloat16 or float16",
            "adam_jax.apply_updates(params, updates)",
        ):
            tx.update(params, state, params)
    else:
        with pytest.warns(UserWarning, match=r"rounds nothing.*adam_jax\.apply_updates\("):
            tx.update(params, state, params)
