"""Gradients that are zero, tiny, huge or NaN: steps stay bounded, recover, and hide no NaN.

The oracles are bounds computed by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax as aj
from adam_jax.storage import Codes, Float

OPTIMIZED = True  # it computes for longer than it compiles


def along(tx, params, grads, steps):
    """The updates and the states of steps along the same gradients."""

    def step(state, _):
        updates, state = tx.update(grads, state, params)
        return state, (updates, state)

    return jax.lax.scan(step, tx.init(params), length=steps)[1]


@functools.cache
def courses(which):
    """By member: the updates and the states of a run along gradients that are zero, tiny, or NaN;
    one program for each.
    """

    def run(member):
        halves, column = jnp.zeros((4, 4), jnp.float16), jnp.ones((3, 1))
        no_epsilon = {"eps": 0.0} if member not in (aj.momentum, aj.adam_atan2) else {}
        if which == "zero":
            return along(member(1e-3), {"w": halves}, {"w": halves}, 3)
        if which == "tiny":
            return along(
                member(0.1, **no_epsilon), column, jnp.array([[1e-30], [0.0], [1e-38]]), 20
            )
        return along(member(0.1), column, jnp.full((3, 1), jnp.nan), 2)

    members = {name: getattr(aj, name) for name in aj.family.__all__}
    return jax.device_get(
        jax.jit(lambda: {name: run(member) for name, member in members.items()})()
    )


def test_float16_zero_gradient_gives_zero(member):
    updates, states = courses("zero")[member.__name__]
    np.testing.assert_array_equal(updates["w"], np.zeros((3, 4, 4)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states))


HUGE = (1e20, -3e38, np.inf)


@functools.cache
def recoveries():
    """By member and huge number: the longest update in 1500 steps, and by step whether updates and
    state are finite.
    """

    def run(tx, huge):
        params = jnp.ones((2, 1))

        def step(state, t):
            updates, state = tx.update(
                jnp.full((2, 1), jnp.where(t == 2, huge, 1.0)), state, params
            )
            finite = jnp.stack(
                [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state))]
            ).all()
            return state, (jnp.abs(updates).max(), finite)

        longest, finite = jax.lax.scan(step, tx.init(params), jnp.arange(1500))[1]
        return longest.max(), finite

    members = {name: getattr(aj, name)(0.1) for name in aj.family.__all__}
    each = jax.jit(
        lambda huge: {
            name: jax.lax.map(functools.partial(run, tx), huge) for name, tx in members.items()
        }
    )
    return jax.device_get(each(jnp.asarray(HUGE, jnp.float32)))


@pytest.mark.parametrize("huge", HUGE)
def test_after_a_huge_gradient_the_parameter_moves_again(member, huge):
    longest, finite = (its[HUGE.index(huge)] for its in recoveries()[member.__name__])
    assert finite.all(), np.flatnonzero(~finite)[:9]
    if member not in (
        aj.momentum,
        aj.radam,
    ):  # momentum's step has the gradient's size; so has RAdam's while ν is young
        assert longest <= 0.1 * 33


def test_huge_gradient_recovers_as_the_average_allows():
    """ν forgets by β₂ a step: with β₂ = 0.5 the spike's 2¹²⁴ is gone, and the step whole again,
    after 150 steps.
    """
    tx = aj.adam(0.1, 0.5, 0.5)
    state, params = tx.init(jnp.zeros(1)), jnp.zeros(1)
    for t in range(151):
        updates, state = tx.update(jnp.full(1, 1e20 if t == 0 else 1.0), state, params)
    np.testing.assert_allclose(updates, -0.1, rtol=1e-5)


def test_tiny_gradients_with_no_epsilon_take_bounded_steps(member):
    """Where g² underflows the quotient would be g/0; and 0/0 where g is 0."""
    updates, _ = courses("tiny")[member.__name__]
    assert np.isfinite(updates).all()
    assert np.abs(updates).max() <= 0.1 * 4


def test_nan_is_not_hidden(member):
    assert np.isnan(courses("nan")[member.__name__][0][-1]).all()


@functools.cache
def after_a_nan():
    """By storage and member: a parameter of ones after three steps, of which the first had a NaN in
    one element's gradient.
    """

    def run(tx):
        params = jnp.ones((2, 3))
        state = tx.init(params)
        for t in range(3):
            grads = jnp.full((2, 3), 0.5).at[0, 0].set(jnp.nan if t == 0 else 0.5)
            updates, state = tx.update(grads, state, params)
            params = params + updates
        return params

    forms = {
        "float32": "float32",
        "bfloat16": Float(jnp.bfloat16, smallest=0),
        "8bit": Codes(smallest=0),
    }
    makes = {name: getattr(aj, name) for name in aj.family.__all__}
    txs = {
        how: {name: make(0.1, storage=form) for name, make in makes.items()}
        for how, form in forms.items()
    }
    return jax.jit(
        lambda: {how: {name: run(tx) for name, tx in its.items()} for how, its in txs.items()}
    )()


@pytest.mark.parametrize("how", ["float32", "bfloat16", "8bit"])
def test_a_nan_in_the_first_gradient_reaches_the_parameter(member, how):
    """Codes store a NaN as 0, so the first update is the only one that can hand it on."""
    params = after_a_nan()[how][member.__name__]
    assert np.isnan(params[0, 0])
    assert (
        member in (aj.lamb, aj.adam_mini) or np.isfinite(params[1]).all()
    )  # these share a norm or a ν


@pytest.mark.parametrize("size", [7, 40_000], ids=["summed as floats", "summed as integers"])
def test_a_nan_in_a_norm_makes_the_leaf_nan(size, standard_promotion):
    """As in Optax: a trust ratio that is not known is not 1."""
    params = {"w": jnp.ones(size).at[3].set(jnp.nan), "v": jnp.ones(size)}
    for tx in (aj.lamb(1.0), optax.lamb(1.0)):
        updates, _ = jax.jit(tx.update)(
            jax.tree.map(jnp.ones_like, params), tx.init(params), params
        )
        assert np.isnan(updates["w"]).all()
        assert np.isfinite(updates["v"]).all()
