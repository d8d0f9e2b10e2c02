"""Optimizers work through JAX's transformations: `jax.vmap`, `jax.grad`, `jax.export`.

The oracles are the runs one by one, and slopes that are known.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitted import DATA, MEMBERS, loss, numbers, scanned, start, together
from helpers import QUICKLY
from jax import export

import adam_jax


@functools.cache
def batches():
    """By member: three models that train together, and one by one."""
    batch = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), start())

    def both(member):
        run = functools.partial(scanned, member(0.1))
        return jax.vmap(run)(batch), jax.lax.map(run, batch)

    return together(both)


def test_vmap_trains_a_batch_of_models_as_one_by_one(member, agree):
    agree(*batches()[member.__name__], rtol=1e-4, atol=1e-6)


def test_vmap_over_learning_rates_and_b2_trains_a_grid_in_one_call(
    train, agree, standard_promotion
):
    rates, decays = np.asarray([1e-3, 1e-2, 0.1], "f4"), np.asarray([0.5, 0.9], "f4")

    def run(rate, b2):
        return train(adam_jax.adamw(rate, b2=b2), start(), DATA, loss)[0]

    picked = [(0, 0), (0, 1), (1, 0), (2, 1)]

    @jax.jit
    def both():
        one_by_one = [
            train(optax.adamw(float(rates[i]), b2=float(decays[j])), start(), DATA, loss)[0]
            for i, j in picked
        ]
        return jax.vmap(jax.vmap(run, (None, 0)), (0, None))(rates, decays), one_by_one

    grid, one_by_one = both()
    for (i, j), alone in zip(picked, one_by_one, strict=True):
        agree(jax.tree.map(lambda x, i=i, j=j: x[i, j], grid), alone, rtol=1e-4, atol=1e-6)


@functools.cache
def first_steps():
    """By member: the update and the state of a first step."""
    return together(lambda member: member(0.1).update(start(), member(0.1).init(start()), start()))


@functools.cache
def ten_rates():
    """How often a step of all members was traced for ten learning rates; and each rate, with what
    the step returned for it.
    """
    params, traces = start(), []

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def step(rate, states):
        traces.append(rate)
        return {
            name: member(rate).update(params, states[name], params)
            for name, member in MEMBERS.items()
        }

    states = {name: member(1.0).init(params) for name, member in MEMBERS.items()}
    found = [(rate, step(rate, states)) for rate in np.linspace(0.01, 0.1, 10, dtype="f4")]
    return len(traces), found


def test_a_learning_rate_that_is_an_argument_compiles_once(member, agree):
    traces, found = ten_rates()
    assert traces == 1
    for rate, each in found:
        updates, after = each[member.__name__]
        np.testing.assert_array_equal(
            adam_jax.hyperparameters(after, member(rate))["learning_rate"], rate
        )
    agree(updates, first_steps()[member.__name__][0], rtol=1e-5)


PLACES = [("b", 0), ("b", 2), ("w", (1, 1))]


@functools.cache
def slopes():
    """By member: where two steps lead from gradients, as one number, and its slope; then from
    gradients 1e-6 to each side.
    """
    params, at = start(), {"w": np.zeros((3, 2)), "b": np.asarray([0.0, 0.01, -0.02])}
    points = jax.tree.map(lambda x: np.stack([x] * (1 + 2 * len(PLACES))), at)
    for i, (leaf, index) in enumerate(PLACES):
        points[leaf][1 + 2 * i][index] += 1e-6
        points[leaf][2 + 2 * i][index] -= 1e-6

    def run(name):
        tx = MEMBERS[name](0.1, **({"eps": 0.1} if "eps" in numbers(MEMBERS[name]) else {}))

        def reach(grads):
            updates, state = tx.update(grads, tx.init(params), params)
            again, _ = tx.update(
                {"w": grads["w"], "b": 2 * grads["b"]}, state, optax.apply_updates(params, updates)
            )
            return sum(
                jnp.sum(u * jnp.arange(1.0, 1 + u.size).reshape(u.shape))
                for u in jax.tree.leaves((updates, again))
            )

        return jax.lax.map(jax.value_and_grad(reach), jax.tree.map(jnp.asarray, points))

    return jax.jit(lambda: {name: run(name) for name in MEMBERS}, compiler_options=QUICKLY)()


def test_an_update_can_be_differentiated_at_a_zero_gradient(member, x64):
    """A8: with no ε inside the root too."""
    name = member.__name__
    values, slope = slopes()[name]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    for (leaf, index), up, down in zip(PLACES, values[1::2], values[2::2], strict=True):
        # A whole leaf without gradient is a jump of LAMB, whose update has a norm of its own, and a
        # zero is one of the angle.
        jumps = leaf == "w" if name == "lamb" else name == "adam_atan2" and index != 2
        if not jumps:
            np.testing.assert_allclose(
                slope[leaf][0][index], (up - down) / 2e-6, rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("eps_root", [0.0, 0.0625])
def test_the_slope_of_adams_first_step_at_zero_is_known(eps_root):
    tx = adam_jax.adam(0.1, eps=0.25, eps_root=eps_root)
    slope = jax.jit(jax.grad(lambda g: tx.update(g, tx.init(g))[0]))(jnp.float32(0.0))
    np.testing.assert_allclose(slope, -0.1 / (0.25 + eps_root**0.5), rtol=1e-6)


@functools.cache
def exported():
    """By member: the update and the state of an exported step."""
    params = start()
    leaves, treedef = jax.tree.flatten(
        (params, {name: member(0.1).init(params) for name, member in MEMBERS.items()})
    )

    @jax.jit
    def step(*leaves):
        params, states = jax.tree.unflatten(treedef, leaves)
        return {
            name: jax.tree.leaves(member(0.1).update(params, states[name], params))
            for name, member in MEMBERS.items()
        }

    found = export.export(step, platforms=["cpu", "cuda", "tpu"])(*leaves)
    assert found.platforms == ("cpu", "cuda", "tpu")
    return found.call(*leaves)


def test_an_exported_step_is_the_jitted_step_and_lowers_for_every_platform(member, agree):
    agree(exported()[member.__name__], jax.tree.leaves(first_steps()[member.__name__]), rtol=1e-5)
