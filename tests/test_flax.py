"""`adam_jax.flax`: Flax's trainers take the steps of `tx.step`, and do all else as Flax's do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from helpers import refused, same

import adam_jax as aj
from adam_jax.flax import Optimizer, TrainState

X = jax.random.normal(jax.random.key(0), (16, 3))
TX = aj.chain(aj.adamw(0.01), optax.clip(1.0))


@pytest.fixture(autouse=True)
def standard():
    with jax.numpy_dtype_promotion("standard"):  # Flax and Optax need it
        yield


def network(dtype):
    return nnx.Sequential(
        nnx.Linear(3, 8, param_dtype=dtype, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(8, param_dtype=dtype, rngs=nnx.Rngs(1)),
        nnx.Linear(8, 2, param_dtype=dtype, rngs=nnx.Rngs(2)),
    )


def loss(model):
    return jnp.mean(jnp.square(model(X) - 1.0))


@nnx.jit
def train(model, optimizer):
    optimizer.update(model, nnx.grad(loss)(model))


def trained(kind, dtype):
    model = network(dtype)
    optimizer = kind(model, TX, wrt=nnx.Param)
    for _ in range(3):
        train(model, optimizer)
    return jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(optimizer))


def test_in_float32_it_is_the_optimizer_of_nnx():
    same(trained(Optimizer, jnp.float32), trained(nnx.Optimizer, jnp.float32))


def test_in_bfloat16_it_takes_the_steps_of_tx():
    model = network(jnp.bfloat16)
    optimizer = Optimizer(model, TX, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    grads = nnx.grad(loss)(model)
    optimizer.update(model, grads)
    given = nnx.to_pure_dict(nnx.state(grads))
    expected, _ = TX.step(given, TX.init(before), before)
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    same(found, expected)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    assert int(optimizer.step[...]) == 1


def test_it_trains_and_hands_on_extra_arguments():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(value)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    model = network(jnp.bfloat16)
    optimizer = Optimizer(model, aj.chain(spy, aj.adam(0.01)), wrt=nnx.Param)
    first = loss(model)
    for _ in range(20):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, value=value)
    assert loss(model) < 0.7 * first
    assert len(seen) == 20


def states(kind, dtype):
    model = nn.Dense(2, param_dtype=dtype)
    params = model.init(jax.random.key(1), X)["params"]
    return kind.create(apply_fn=model.apply, params=params, tx=TX)


def linen_loss(params):
    return jnp.mean(
        jnp.square(X @ params["kernel"].astype(jnp.float32) + params["bias"][None] - 1.0)
    )


def run(kind, dtype):
    state = states(kind, dtype)
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(linen_loss)(state.params)))
    for _ in range(3):
        state = step(state)
    return state


def test_in_float32_it_is_the_train_state_of_flax():
    ours, theirs = (run(kind, jnp.float32) for kind in (TrainState, train_state.TrainState))
    same((ours.params, ours.opt_state, ours.step), (theirs.params, theirs.opt_state, theirs.step))


def test_in_bfloat16_the_train_state_takes_the_steps_of_tx():
    state = states(TrainState, jnp.bfloat16)
    grads = jax.grad(linen_loss)(state.params)
    params, opt_state = TX.step(grads, TX.init(state.params), state.params)
    after = state.apply_gradients(grads=grads, apply_fn=abs)
    same((after.params, after.opt_state), (params, opt_state))
    assert (after.step, after.apply_fn) == (1, abs)


def test_what_is_overwritten_with_its_gradient():
    """The scales of float8, as Flax names their collection."""
    scales = {"scale": jnp.float32(3.0)}
    params = {"params": {"w": jnp.ones(3)}, train_state.OVERWRITE_WITH_GRADIENT: scales}
    grads = {
        "params": {"w": jnp.ones(3)},
        train_state.OVERWRITE_WITH_GRADIENT: {"scale": jnp.float32(5.0)},
    }
    made = [
        kind.create(apply_fn=None, params=params, tx=TX).apply_gradients(grads=grads)
        for kind in (TrainState, train_state.TrainState)
    ]
    same(*(state.params for state in made))
    np.testing.assert_array_equal(made[0].params[train_state.OVERWRITE_WITH_GRADIENT]["scale"], 5.0)


def test_a_transformation_without_step_is_refused():
    foreign, params = optax.chain(aj.adam(0.1)), {"w": jnp.ones(3)}
    with refused(
        TypeError, "adam_jax.flax.Optimizer: tx: found <chain of optax>", "adam_jax.chain"
    ):
        Optimizer(network(jnp.float32), foreign, wrt=nnx.Param)
    with refused(TypeError, "adam_jax.flax.TrainState: tx: found 0.1"):
        TrainState.create(apply_fn=None, params=params, tx=0.1)
