"""Stages that round work under Optax's wrappers and JAX's transformations.

The oracle is the sum of each step, rounded by NumPy, and the plain loop.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refused
from jax import lax
from rounded import (
    LINKS,
    RATE,
    apply,
    apply_eagerly,
    bits,
    check_path,
    descent,
    f32,
    grads_of,
    small_params,
    walk,
)

import adam_jax as aj


def wrapped(link):
    """name -> transformation, the label says how the leaves and steps are to be read."""
    mask = {"w": True, "b": False}
    return {
        "chain": descent(link),
        "nested": aj.chain(
            optax.identity(), aj.chain(aj.chain(aj.scale_by_learning_rate(RATE)), aj.chain(link))
        ),
        "optax.chain": optax.chain(optax.identity(), descent(link)),
        "optax.chain of stages": optax.chain(optax.scale(-RATE), link),
        "behind optax": aj.chain(optax.scale(-RATE), link),
        "masked": optax.masked(descent(link), mask),
        "masked link": optax.chain(optax.scale(-RATE), optax.masked(link, mask)),
        "partition": optax.partition({0: descent(link), 1: optax.sgd(0.1)}, {"w": 0, "b": 1}),
        "inject_hyperparams": optax.inject_hyperparams(
            lambda learning_rate: descent(link, learning_rate)
        )(RATE),
        "MultiSteps": optax.MultiSteps(descent(link), 2).gradient_transformation(),
        "averaged": aj.chain(descent(link), aj.stages.average_parameters(0.9)),
        "apply_if_finite inside": optax.chain(optax.apply_if_finite(optax.scale(-RATE), 3), link),
    }


@pytest.mark.parametrize("how", wrapped(LINKS["compensate"]))
def test_under_wrappers(link, how, standard_promotion):
    params = small_params()
    grads = grads_of(params, 8)
    if how == "MultiSteps":  # both of two steps see the same, whose mean it is
        grads = [g for g in grads[:4] for _ in range(2)]
    path, _ = walk(wrapped(link)[how], params, grads)
    path = [p["w"] for p in path]
    if how == "MultiSteps":
        assert all((f32(a) == f32(b)).all() for a, b in zip(path[::2], path[1::2], strict=False))
        path, grads = path[::2], grads[::2]
    check_path(link, path, [g["w"] for g in grads])


def test_a_step_skipped_inside_leaves_the_parameter_where_it_was(link, standard_promotion):
    """Optax's own `apply_if_finite` wants updates of the gradients' dtype back, so it stands before
    a link, not around it.
    """
    params = small_params()
    tx = wrapped(link)["apply_if_finite inside"]
    grads = grads_of(params, 2)
    path, _ = walk(tx, params, [grads[0], jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads[1])])
    np.testing.assert_array_equal(f32(path[1]["w"]), f32(path[2]["w"]))


def test_around_a_link_apply_if_finite_needs_wide_gradients(link, standard_promotion):
    params = small_params()
    grads = [jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in grads_of(params, 4)]
    path, _ = walk(optax.apply_if_finite(descent(link), 3), params, grads)
    check_path(link, [p["w"] for p in path], [g["w"] for g in grads])


def test_a_derivative_through_rounded_parameters_is_refused(link, standard_promotion):
    def end(rate, dtype):
        params = {"w": jnp.ones(4, dtype)}
        tx = aj.chain(aj.scale_by_learning_rate(rate), link)
        updates, _ = tx.update(params, tx.init(params), params)
        return aj.apply_updates(params, updates)["w"].astype(jnp.float32).sum()

    name = link.init.spec.constructor.__name__
    says = f"{name}: found a derivative", "rounding has no derivative", f"leave out {name}()"
    for way in (jax.grad, jax.jacfwd, lambda f, **of: jax.grad(jax.jit(f, static_argnums=1), **of)):
        with refused(ValueError, *says):
            jax.eval_shape(lambda rate, way=way: way(end, argnums=0)(rate, jnp.bfloat16), 0.5)
    assert jax.grad(end)(0.5, jnp.float32) == -4  # these are not rounded


def test_scan_donation_and_vmap_are_the_loop(link, standard_promotion):
    params, tx = small_params(), descent(link)
    grads = grads_of(params)
    path, state = walk(tx, params, grads)
    expected = jax.tree.leaves((path[-1], state))

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    loop = jax.jit(
        lambda p, s, g: lax.scan(lambda c, g: (apply(tx, *c, g), None), (p, s), g, unroll=3)[0]
    )
    step = jax.jit(functools.partial(apply_eagerly, tx), donate_argnums=(0, 1))
    donated = jax.tree.map(jnp.copy, (params, tx.init(params)))
    for g in grads:
        donated = step(*donated, g)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), (params, tx.init(params)))
    batched = jax.jit(jax.vmap(functools.partial(apply, tx)))
    for g in grads:
        batch = batched(*batch, jax.tree.map(lambda x: jnp.stack([x, x]), g))
    found = {"scan": loop(params, tx.init(params), stacked), "donated": donated}
    found |= {f"vmap {i}": jax.tree.map(lambda x, i=i: x[i], batch) for i in range(2)}
    for name, tree in found.items():
        for a, b in zip(jax.tree.leaves(tree), expected, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b), err_msg=name)
