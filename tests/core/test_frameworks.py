"""Optimizers work in Flax and Equinox as Optax's do.

The oracle is Optax's own optimizer in the same framework.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from fitted import DATA, TWINS
from flax import nnx
from flax.training.train_state import TrainState

import adam_jax


def test_flax_train_state(agree, standard_promotion):
    model = nn.Dense(2)
    x = jnp.asarray(DATA)

    def run(tx):
        state = TrainState.create(
            apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=tx
        )

        def step(state, batch):
            grads = jax.grad(lambda p: jnp.sum((state.apply_fn(p, batch) - 1) ** 2))(state.params)
            return state.apply_gradients(grads=grads), None

        return jax.jit(lambda state: jax.lax.scan(step, state, x)[0])(state)

    ours, theirs = (run(tx) for tx in TWINS)
    agree(ours.params, theirs.params, rtol=1e-4)
    assert ours.step == len(DATA)


def test_nnx_optimizer(agree, standard_promotion):
    def run(tx):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        graph, variables = nnx.split((model, optimizer))

        def step(variables, x):
            model, optimizer = nnx.merge(graph, variables)
            optimizer.update(model, nnx.grad(lambda model: jnp.sum((model(x) - 1) ** 2))(model))
            return nnx.state((model, optimizer)), None

        nnx.update(
            (model, optimizer),
            jax.jit(lambda v, x: jax.lax.scan(step, v, x)[0])(variables, jnp.asarray(DATA)),
        )
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    agree(*(run(tx) for tx in TWINS), rtol=1e-4)


def test_equinox_filters_and_an_equal_transformation_does_not_retrace(agree, standard_promotion):
    traces = []

    @eqx.filter_jit
    def loop(model, tx, x):
        traces.append(tx)
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def step(carry, x):
            params, state = carry
            grads = eqx.filter_grad(
                lambda params: jnp.sum((eqx.combine(params, static)(x) - 1) ** 2)
            )(params)
            updates, state = tx.update(grads, state, params)
            return (eqx.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), x)[0][0]

    model, x = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), jnp.asarray(DATA)
    ours = [loop(model, adam_jax.adamw(0.01), x) for _ in range(2)][-1]
    assert len(traces) == 1
    agree(ours, loop(model, optax.adamw(0.01), x), rtol=1e-4, atol=1e-6)
    loop(model, adam_jax.adamw(0.02), x)
    assert len(traces) == 3
