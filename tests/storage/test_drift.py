"""Rounding moves no parameter on average, neither on noise nor under weight decay.

The oracles are a mean that must be zero, and the same run in float32.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
from applied import applied

import adam_jax as aj

OPTIMIZED = True  # it computes for longer than it compiles

MEMBERS = aj.family.__all__


def outward(groups, sizes, columns, steps, rate, dtype=jnp.bfloat16):
    """By group and size, how far parameters move outward per step under gradients of pure noise:
    mean and standard error.

    In learning rates. Half of the parameters are positive and half negative, under the same
    gradients, so that what a gradient does to one it undoes in the other; what is left is what
    rounding does."""
    start = jnp.asarray([[size, -size] for size in sizes], dtype)[..., None] * jnp.ones(
        (1, 1, columns), dtype
    )
    params = dict.fromkeys(groups, start)
    tx = aj.by_path(groups, default="frozen")

    def step(carry, key):
        params, state = carry
        grad = jnp.broadcast_to(0.3 * jax.random.normal(key, (len(sizes), 1, columns)), start.shape)
        updates, state = tx.update(dict.fromkeys(params, grad), state, params)
        return (applied(params, updates), state), None

    @jax.jit
    def run(key):
        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[0][0]

    moved = {}
    for name, after in run(jax.random.key(0, impl="rbg")).items():
        way = (
            (np.asarray(after, np.float64) - np.asarray(start, np.float64))
            * np.array([[1], [-1]])
            / (rate * steps)
        )
        pair = way.mean(1)
        moved[name] = np.stack([pair.mean(-1), pair.std(-1) / np.sqrt(columns)])
    return moved


def test_noise_drives_no_parameter_outward():
    """In version 0.1.0 it did by 0.006 learning rates per step: moments and parameters were rounded
    by the same bits.
    """
    links = {"rounded": aj.round_stochastically, "compensated": aj.compensate}
    members = {name: getattr(aj, name) for name in MEMBERS}
    decaying = [
        name
        for name, make in members.items()
        if "weight_decay" in inspect.signature(make).parameters
    ]
    groups = {
        f"{name}-{how}": aj.chain(
            make(1e-2, storage="8bit", **({"weight_decay": 0.0} if name in decaying else {})),
            link(),
        )
        for name, make in members.items()
        for how, link in links.items()
    }
    for name, (drift, error) in outward(groups, (1.25, 0.3), 1 << 13, 200, 1e-2).items():
        assert (np.abs(drift) < 3 * error).all(), (name, drift, error)
        assert (np.abs(drift) < 0.001).all(), (name, drift, error)


def test_weights_decay_under_noise_as_in_float32():
    sizes = (0.06, 0.02)
    four_bytes = {
        how: aj.chain(aj.adamw(1e-3, weight_decay=0.1, storage="8bit"), link())
        for how, link in {"rounded": aj.round_stochastically, "compensated": aj.compensate}.items()
    }
    exact = outward(
        {"float32": aj.adamw(1e-3, weight_decay=0.1)}, sizes, 1 << 14, 250, 1e-3, jnp.float32
    )["float32"]
    np.testing.assert_allclose(exact[0], [-0.006, -0.002], rtol=0.1)
    for name, (drift, error) in outward(four_bytes, sizes, 1 << 14, 250, 1e-3).items():
        difference = np.abs(drift - exact[0])
        assert (difference < 3 * np.hypot(error, exact[1])).all(), (name, drift, exact)
        assert (difference < 0.0005).all(), (name, drift, exact)
