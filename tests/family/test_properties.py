"""What the paper proves of Adam (§2.1), for hyperparameters that hypothesis chooses, and in which
sense it is two in one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adam_jax as aj

settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("seeded")

betas = st.integers(0, 999).map(lambda n: n / 1000)
seeds = st.integers(0, 2**32 - 1)
STEPS, SIZE = 12, 6


@jax.jit
def trajectory(grads, b1, b2, eps):
    """The updates at learning rate 1 and every step; hyperparameters are traced, so one compilation
    serves every example.
    """
    tx = aj.adam(1.0, b1, b2, eps)

    def step(state, g):
        update, state = tx.update(g, state)
        return state, update

    return jax.lax.scan(step, tx.init(grads[0]), grads)[1]


def normal(seed, scale=1.0):
    return jnp.asarray(
        np.random.default_rng(seed).standard_normal((STEPS, SIZE)) * scale, jnp.float32
    )


@given(seeds, betas, betas, st.integers(-12, 12))
def test_invariant_to_the_scale_of_gradients(seed, b1, b2, power):
    grads = normal(seed)
    found = trajectory(grads * 2.0**power, b1, b2, 0.0)
    # Scaling by a power of two is exact, so only the smallest denominator (2⁻⁶³) can tell the two
    # apart.
    np.testing.assert_allclose(found, trajectory(grads, b1, b2, 0.0), rtol=1e-6)


@given(seeds, betas, betas)
def test_the_papers_bound_on_a_step(seed, b1, b2):
    """|Δ| ≤ α·max((1 − β₁)/√(1 − β₂), 1) in the paper's two cases: gradients of one size, and none
    before the present one.
    """
    bound = max((1 - b1) / np.sqrt(1 - b2), 1) * (1 + 1e-5)
    signs = jnp.sign(normal(seed))
    assert (np.abs(trajectory(signs * 0.01, b1, b2, 0.0)) <= bound).all()
    present = np.random.default_rng(seed).integers(0, STEPS, SIZE), np.arange(SIZE)
    sparse = jnp.zeros((STEPS, SIZE)).at[present].set(0.01)
    assert (np.abs(trajectory(sparse, b1, b2, 0.0))[present] <= bound).all()


@given(seeds, betas, betas, st.floats(0, 6))
def test_a_bound_that_always_holds(seed, b1, b2, spread):
    """|Δ| ≤ α·√Σ(wᵢ²/vᵢ), with wᵢ and vᵢ the weights of the gradients in μ̂ and their squares in
    ν̂: Cauchy and Schwarz.
    """
    sizes = 10 ** np.random.default_rng(seed).uniform(-spread, spread, (STEPS, SIZE))
    found = np.abs(trajectory(normal(seed) * jnp.asarray(sizes, jnp.float32), b1, b2, 0.0))
    for t in range(1, STEPS + 1):
        w, v = (np.array([(1 - b) * b**age / (1 - b**t) for age in range(t)]) for b in (b1, b2))
        if (v > 0).all():
            assert (found[t - 1] <= np.sqrt(np.sum(w**2 / v)) * (1 + 1e-4)).all()


def test_the_papers_bound_is_not_a_theorem():
    """Gradients that shrink as (β₁/β₂)ᵗ backwards in time make the step 7.3 times α, where the
    paper's bound says 3.2.
    """
    b1, b2, steps = 0.9, 0.999, 200
    grads = jnp.asarray(((b1 / b2) ** np.arange(steps)[::-1])[:, None], jnp.float32)
    tx = aj.adam(1.0, b1, b2, 0.0)
    zeros = jnp.zeros((20_000, 1))  # until both weights are 1
    state = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(grads[0]), zeros)[0]
    last = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, grads)[1][-1]
    limit = (1 - b1) / np.sqrt(1 - b2) / np.sqrt(1 - b1**2 / b2)
    np.testing.assert_allclose(-last, limit, rtol=1e-3)
    assert limit > 2 * max((1 - b1) / np.sqrt(1 - b2), 1)


@given(seeds, betas, betas, st.integers(-9, 9))
def test_first_step_is_the_sign(seed, b1, b2, power):
    grads = normal(seed) * 10.0**power
    np.testing.assert_allclose(trajectory(grads, b1, b2, 0.0)[0], -jnp.sign(grads[0]), rtol=1e-5)


@given(seeds, betas, betas, st.integers(1, SIZE - 1))
def test_how_the_tree_is_split_does_not_matter(seed, b1, b2, at):
    grads, tx = normal(seed), aj.adam(1.0, b1, b2, 0.0)
    parts = {"a": grads[0, :at], "b": [grads[0, at:]]}
    state = tx.init(parts)
    for g, whole in zip(grads[:3], trajectory(grads, b1, b2, 0.0), strict=False):
        updates, state = tx.update({"a": g[:at], "b": [g[at:]]}, state)
        np.testing.assert_allclose(
            np.concatenate([updates["a"], updates["b"][0]]), whole, rtol=1e-4, atol=1e-6
        )


@jax.jit
def corrected_rmsprop(grads, b2):
    tx = aj.rmsprop(1.0, b2, 1e-6, eps_in_sqrt=False, bias_correction=True)
    return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), grads)[1]


@given(seeds, betas)
def test_without_b1_adam_is_rmsprop_corrected(seed, b2):
    grads = normal(seed)
    np.testing.assert_allclose(
        trajectory(grads, 0.0, b2, 1e-6), corrected_rmsprop(grads, b2), rtol=1e-4
    )


@given(seeds, st.floats(0.1, 0.95))
def test_a_large_epsilon_makes_adam_momentum(seed, b1):
    """ε ≫ √ν: the update times ε is the corrected first moment, and nothing else."""
    grads = normal(seed)
    found = trajectory(grads, b1, 0.999, 1e9) * 1e9
    momentum = aj.momentum(1.0, b1, dampened=True)
    state = momentum.init(grads[0])
    for g, update in zip(grads, found, strict=True):
        expected, state = momentum.update(g, state)
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("b1", [0.5, 0.9])
def test_b2_towards_one_makes_adam_momentum_with_one_rate_each(x64, b1):
    """β₂ → 1: ν̂ becomes the plain mean of all squares, and where gradients are stationary it
    stands still.

    Then Adam is momentum with a constant rate 1/√E[g²] for every parameter: the same direction as
    momentum's once each parameter is measured in units of its gradients, and the same direction
    outright where those units are equal."""
    steps, size = 4000, 64
    rng = np.random.default_rng(0)
    units = 10.0 ** rng.uniform(-3, 3, size)

    def final(tx, grads):
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), grads)[1]

    for scale in (np.ones(size), units):
        grads = jnp.asarray((rng.standard_normal((steps, size)) + 0.2) * scale)
        adam = np.asarray(final(aj.adam(1.0, b1, 1 - 1e-13, 0.0), grads))
        momentum = np.asarray(final(aj.momentum(1.0, b1, dampened=True), grads))
        mean_square = np.cumsum(np.square(grads), axis=0) / np.arange(1, steps + 1)[:, None]
        np.testing.assert_allclose(
            adam * np.sqrt(mean_square) / scale, momentum / scale, rtol=1e-8, atol=1e-12
        )

        def cosine(a, b):
            return np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)

        in_units = cosine(adam[-1], momentum[-1] / np.sqrt(np.square(scale)))
        assert in_units > 0.999
        if scale is not units:
            assert cosine(adam[-1], momentum[-1]) > 0.999
