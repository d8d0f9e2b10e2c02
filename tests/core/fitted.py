"""A loss, where its parameters start, and runs of all optimizers in one program; their
hyperparameters.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import QUICKLY

import adam_jax

RATE = optax.cosine_decay_schedule(0.1, 30)
DATA = np.random.default_rng(0).normal(size=(40, 3))


def loss(params, batch):
    """Curved, and steeper in some directions than in others; its gradient changes sign along
    `DATA`.
    """
    steep = np.asarray([0.1, 1.0, 10.0])
    return jnp.sum(jnp.cosh(params["w"] - 0.3) * steep[:, None]) + jnp.sum(
        (params["b"] - batch) ** 2 * steep
    )


def start():
    draw = np.random.default_rng(1).normal
    return {"w": jnp.asarray(draw(size=(3, 2))), "b": jnp.asarray(draw(size=3))}


MEMBERS = {name: getattr(adam_jax, name) for name in adam_jax.family.__all__}


def together(run, *args):
    """By name: `run(member)`, or `run(member, *args)`, of every member, all in one program."""
    return jax.jit(
        lambda *args: {name: run(member, *args) for name, member in MEMBERS.items()},
        compiler_options=QUICKLY,
    )(*args)


TWINS = (adam_jax.adamw(RATE, weight_decay=0.1), optax.adamw(RATE, weight_decay=0.1))


def scanned(tx, params, steps=3):
    """Steps along gradients that grow, in a scan: -> (params, state)."""

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(jax.tree.map(lambda p: i * p, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(1.0, steps + 1))[0]


def numbers(member):
    """The hyperparameters that have a numeric default: name -> value. Constants are none."""
    constants = ("initial_scale", "initial_accumulator_value", "a", "b")
    arguments = inspect.signature(member).parameters.values()
    return {
        a.name: a.default for a in arguments if type(a.default) is float and a.name not in constants
    }
