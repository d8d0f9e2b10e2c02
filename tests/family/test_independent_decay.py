"""`decay="independent"`: the decay follows the shape of the schedule and not the size of the
learning rate.

The oracles are the paper's Adam with that decay beside it, and steps computed by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import papers
import pytest
from trajectories import RATE, agree, ours, problem

import adam_jax as aj

pytestmark = pytest.mark.usefixtures("x64")


def test_independent_decay_follows_the_schedule(standard_promotion):
    gradients, theta = problem(2)

    def independent(peak):
        before, p = theta.astype(papers.L), theta.astype(papers.L)
        start = np.zeros_like(theta)
        for t, after in enumerate(papers.adam(gradients, start, 1)):
            u, start = start - after, after
            share = papers.L(float(jnp.asarray(RATE(t)))) / papers.L(peak)
            p = before - papers.L(peak) * share * u - papers.dec(0.07) * share * before
            before = p
            yield p

    tx = aj.adamw(RATE, weight_decay=0.07, decay="independent")
    agree(ours(tx, gradients, theta), independent(0.05), theta)


@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_independent_decay_ignores_a_constant_rate(rate):
    tx = aj.adamw(rate, weight_decay=0.25, decay="independent")
    params = jnp.array([2.0, -4.0])
    updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
    np.testing.assert_array_equal(updates, [-0.5, 1.0])


@pytest.mark.parametrize("traced", [False, True])
def test_independent_decay_made_inside_jit(traced, standard_promotion):
    """The peak is looked for when the transformation is made, also while something is traced, and
    for a traced schedule.
    """

    @jax.jit
    def step(rate):
        schedule = (
            (lambda c: rate * jnp.where(c < 10, 1.0, 0.5))
            if traced
            else optax.cosine_decay_schedule(0.1, 100)
        )
        tx = aj.adamw(schedule, weight_decay=0.25, decay="independent")
        params = jnp.array([2.0, -4.0])
        return tx.update(jnp.zeros(2), tx.init(params), params)[0]

    np.testing.assert_allclose(step(0.1), [-0.5, 1.0], rtol=1e-6)


def test_a_schedule_without_a_peak_is_refused(standard_promotion):
    with pytest.raises(
        ValueError, match="the peak of this schedule is 0.0; expected a positive number"
    ):
        aj.adamw(optax.constant_schedule(0.0), decay="independent")
