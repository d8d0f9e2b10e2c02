"""The links that fit any member, and what is read from their states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refused

import adam_jax as aj


def run(tx, params, grads):
    """Parameters after every step, and the last state."""
    state, path = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path, state


def random_grads(steps, shape=(4, 3), seed=0):
    return [
        jnp.asarray(g, jnp.float32)
        for g in np.random.default_rng(seed).standard_normal((steps, *shape))
    ]


def test_cautious_by_hand():
    tx = aj.chain(aj.momentum(0.1, 0.5), aj.stages.cautious())
    params = jnp.zeros(4)
    state = tx.init(params)
    _, state = tx.update(jnp.array([1.0, 1.0, 1.0, 1.0]), state)
    # The sum is 0.5 + g: [1.5, 0.4, -0.5, 0.6]; the second element's gradient points the other way.
    # Three of four agree.
    updates, _ = tx.update(jnp.array([1.0, -0.1, -1.0, 0.1]), state)
    np.testing.assert_allclose(updates, np.array([-0.15, 0.0, 0.05, -0.06]) / 0.75, rtol=1e-6)


def test_cautious_on_either_side_of_the_rate_is_the_same(member):
    """Where nothing decays, and nothing in the chain depends on the order of the two."""
    *direction, rate = member(0.1).stages
    if not rate.interface.rate or member is aj.rmsprop:
        pytest.skip("the learning rate is not this member's last stage")
    before, after = (
        aj.chain(*direction, aj.stages.cautious(), rate),
        aj.chain(member(0.1), aj.stages.cautious()),
    )
    params, grads = jnp.ones((4, 3)), random_grads(6)
    np.testing.assert_allclose(
        run(before, params, grads)[0][-1], run(after, params, grads)[0][-1], rtol=1e-5
    )


def test_cautious_fits_every_member(member):
    """Elementwise: zero where the plain step goes uphill, at least the plain step where it goes
    down.
    """
    plain, tx = member(0.1), aj.chain(member(0.1), aj.stages.cautious())
    params = jnp.ones((4, 3))
    state, plain_state = tx.init(params), plain.init(params)
    for g in random_grads(5):
        updates, state = tx.update(g, state, params)
        whole, plain_state = plain.update(g, plain_state, params)
        uphill = np.asarray(whole * g) >= 0
        assert (np.asarray(updates)[uphill] == 0).all()
        assert (np.abs(updates) >= np.abs(whole))[~uphill].all()


def test_cautious_needs_to_know():
    g = jnp.ones(2)
    alone = aj.stages.cautious()
    with pytest.raises(ValueError, match="does not know the gradient.*gradient=grads"):
        alone.update(g, alone.init(g), g)
    behind = aj.chain(optax.scale(-0.1), aj.stages.cautious())
    with pytest.raises(ValueError, match="whether the learning rate is already in the updates"):
        behind.update(g, behind.init(g), g)
    told = aj.chain(optax.scale(-0.1), aj.stages.cautious(after_learning_rate=True))
    np.testing.assert_allclose(told.update(g, told.init(g))[0], -0.1 * g)
    theirs = optax.chain(aj.adam(0.1), aj.stages.cautious(after_learning_rate=True))
    np.testing.assert_allclose(
        theirs.update(g, theirs.init(g), g, gradient=g)[0], -0.1 * g, rtol=1e-6
    )


@pytest.mark.parametrize("threshold", [0.3, 2.0])
def test_clip_update_rms_by_hand(threshold):
    """Before the rate, after it and in optax.chain before it: the same. rms([3, 4]) is √12.5."""
    g = jnp.array([3.0, -4.0])
    expected = -0.1 * g * min(1, threshold / np.sqrt(12.5))
    clip, rate = aj.stages.clip_update_rms(threshold), aj.scale_by_learning_rate(0.1)
    for tx in (aj.chain(clip, rate), aj.chain(rate, clip), optax.chain(clip, rate)):
        np.testing.assert_allclose(tx.update(g, tx.init(g))[0], expected, rtol=1e-6)


def test_clip_update_rms_fits_every_member(member):
    tx, params = aj.chain(member(0.1), aj.stages.clip_update_rms(0.5)), jnp.ones((4, 3))
    state = tx.init(params)
    for g in random_grads(4):
        updates, state = tx.update(100 * g, state, params)
        assert np.sqrt(np.mean(np.square(updates))) <= 0.05 * (1 + 1e-6)


def test_clip_update_rms_needs_to_know_the_rate():
    g = jnp.ones(2)
    behind = aj.chain(optax.scale(-0.1), aj.stages.clip_update_rms(0.5))
    with pytest.raises(
        ValueError, match="does not know the one learning rate.*before the learning rate"
    ):
        behind.update(g, behind.init(g))
    between = aj.chain(
        optax.scale(3.0), aj.stages.clip_update_rms(0.5), aj.scale_by_learning_rate(0.1)
    )
    np.testing.assert_allclose(between.update(g, between.init(g))[0], -0.05 * g, rtol=1e-6)


def test_cautious_compares_signs_that_no_product_shows():
    tx = aj.chain(aj.momentum(1.0), aj.stages.cautious())
    g = jnp.full(2, 1e-30)
    np.testing.assert_allclose(tx.update(g, tx.init(g))[0], -g)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_clip_update_rms_of_nothing_is_nothing(rate):
    tx = aj.chain(aj.adam(rate), aj.stages.clip_update_rms())
    zeros = {"w": jnp.zeros((2, 2)), "none": jnp.zeros((0, 3))}
    updates, _ = tx.update(zeros, tx.init(zeros))
    np.testing.assert_array_equal(updates["w"], np.zeros((2, 2)))


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_average_of_parameters(member, decay):
    """The weighted mean of all parameters so far, weights normalized: exact from the first step."""
    params = {"w": jnp.ones((4, 3)), "h": jnp.ones((4, 3), jnp.bfloat16), "i": jnp.arange(3)}
    tx = aj.chain(member(0.1), aj.stages.average_parameters(decay))
    grads = [
        {"w": g, "h": g.astype(jnp.bfloat16), "i": jnp.zeros(3, jnp.int32)} for g in random_grads(7)
    ]
    path, state = run(tx, params, grads)
    weights = decay ** np.arange(len(grads))[::-1].astype(np.longdouble)
    average = aj.stages.averaged_parameters(state)
    for name in ("w", "h"):
        points = np.array([np.asarray(p[name], np.longdouble) for p in path])
        expected = np.tensordot(weights / weights.sum(), points, 1)
        assert average[name].dtype == jnp.float32
        np.testing.assert_allclose(average[name], expected.astype(float), rtol=3e-6)
    assert average["i"] is None


def test_average_before_the_first_step_and_its_buffers():
    params = jnp.ones(3)
    tx = aj.chain(aj.adam(0.1), aj.stages.average_parameters(0.9))
    state = tx.init(params)
    np.testing.assert_array_equal(aj.stages.averaged_parameters(state), params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    donated = jax.jit(step, donate_argnums=(0, 1))
    donated(params, state)  # would fail, were the average the parameters' own buffer


def test_averaged_parameters_wants_exactly_one():
    with pytest.raises(ValueError, match="found 0 averages.*average_parameters"):
        aj.stages.averaged_parameters(aj.adam(0.1).init(jnp.ones(2)))
    two = aj.chain(aj.stages.average_parameters(0.9), aj.stages.average_parameters(0.99))
    with pytest.raises(ValueError, match="found 2 averages"):
        aj.stages.averaged_parameters(two.init(jnp.ones(2)))
    wrapped = optax.MultiSteps(aj.chain(aj.adam(0.1), aj.stages.average_parameters(0.9)), 2)
    np.testing.assert_array_equal(
        aj.stages.averaged_parameters(wrapped.init(jnp.ones(2))), np.ones(2)
    )


def test_hyperparameters_of_groups():
    tx = optax.partition(
        {"a": aj.adam(0.1), "b": aj.adam(optax.linear_schedule(1.0, 0.0, 10))}, {"x": "a", "y": "b"}
    )
    params = {"x": jnp.ones(2), "y": jnp.ones(2)}
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(params, state, params)
    for group, inner, rate in [
        ("a", aj.adam(0.1), 0.1),
        ("b", aj.adam(optax.linear_schedule(1.0, 0.0, 10)), 0.8),
    ]:
        found = aj.hyperparameters(state.inner_states[group], inner)
        np.testing.assert_allclose(found["learning_rate"], rate, rtol=1e-6)
    with refused(ValueError, "found 2 states of adam(", ".inner_states['a']", "expected one"):
        aj.hyperparameters(state, aj.adam(0.1))
