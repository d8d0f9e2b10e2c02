"""No two stages, moments, leaves, groups or steps of a run share random bits, and a stage has its
bits wherever it stands.

The oracles are correlations that must vanish, and the same stage alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from applied import applied

import adam_jax as aj
from adam_jax import storage
from adam_jax.storage.random_bits import StepBits

OPTIMIZED = True  # it computes for longer than it compiles


def normals(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def stage_of_everything(seed):
    """An average ahead of groups, which together have every stage that rounds moments, and round
    their parameters.
    """
    form = storage.Codes(seed=seed, smallest=0)

    def rounded(tx):
        return aj.chain(tx, aj.round_stochastically(seed))

    groups = {
        "a/.*": rounded(aj.amsgrad(1e-3, storage=form)),
        "b/.*": rounded(aj.ademamix(1e-3, storage=form)),
        "c/.*": rounded(aj.adopt(1e-3, storage=form)),
        "d/.*": rounded(aj.adam(1e-3, storage=storage.Float(jnp.bfloat16, seed=seed))),
    }
    inner = aj.by_path(groups, default=rounded(aj.adam(1e-3, storage=form)))
    ahead = aj.chain(aj.track_moments(storage=form), aj.correct_bias(), aj.scale_by_moments())
    return aj.chain(ahead, inner)


def recorded(make, params, seeds, steps, monkeypatch):
    """The words that each rounding of a run reads: (members, steps, streams, elements)."""
    seen = []

    def record(function):
        @functools.wraps(function)
        def wrapper(*args):
            seen.append(function(*args))
            return seen[-1]

        return wrapper

    monkeypatch.setattr(StepBits, "of", record(StepBits.of))

    def run(seed):
        tx = make(seed)

        def step(state, _):
            seen.clear()
            _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            return state, jnp.stack([bits.ravel() for bits in seen])

        return jax.lax.scan(step, tx.init(params), None, length=steps)[1]

    return np.asarray(jax.jit(jax.vmap(run))(seeds))


def test_no_two_streams_are_correlated_at_any_lag(monkeypatch):
    """Of every stage, slot, leaf, group and member of a `vmap` with every other, and with itself, 0
    to 3 steps later.
    """
    leaves = {
        f"{group}/{i}": jnp.ones((64, 64), jnp.bfloat16) for group in "abcde" for i in range(2)
    }
    params = {group: {i: leaves[f"{group}/{i}"] for i in "01"} for group in "abcde"}
    found = recorded(stage_of_everything, params, jnp.arange(2), 12, monkeypatch)
    members, steps, streams, elements = found.shape
    # μ and ν in front; of two leaves a group μ and ν, a maximum, a slow mean, twice one in ADOPT;
    # those that round parameters.
    assert streams == 2 * 10 + 2 * (3 + 3 + 2 + 2 + 2) + 10
    x = (found.astype(np.float64) - 2.0**31) / (2.0**32 / np.sqrt(12))
    x = x.transpose(1, 0, 2, 3).reshape(steps, members * streams, elements)
    for lag in range(4):
        n = (steps - lag) * elements
        found = np.einsum("tin,tjn->ij", x[lag:], x[: steps - lag], optimize=True) / n
        if lag == 0:
            np.testing.assert_allclose(np.diag(found), 1, atol=0.02)
            np.fill_diagonal(found, 0)
        assert np.abs(found).max() * np.sqrt(n) < 4 * 1.25, lag
        # Not only the largest: the sum of squares of so many standard normal numbers.
        pairs = found.size if lag else found.size - len(found)
        assert abs((found**2).sum() * n / pairs - 1) < 5 * np.sqrt(2 / (pairs / 2)), lag


def test_equal_names_have_equal_bits_wherever_they_stand():
    """A stage rounds by the same bits in a chain, in a group, and in a chain or
    partition of Optax.
    """
    params = {name: jnp.full((64, 64), 1.25, jnp.bfloat16) for name in "ab"}
    grads = {name: normals(64, 64, seed=i) for i, name in enumerate("ab")}

    def inner():
        return aj.chain(aj.adam(1e-3, storage="8bit"), aj.round_stochastically())

    forms = {
        "chain": inner(),
        "behind others": aj.chain(optax.identity(), aj.stages.clip_elements(1e9), inner()),
        "groups": aj.by_path({"a": inner()}, default=inner()),
        "optax.partition": optax.partition({0: inner(), 1: inner()}, {"a": 0, "b": 1}),
        "optax.chain": optax.chain(aj.adam(1e-3, storage="8bit"), aj.round_stochastically()),
        "guarded": aj.skip_nonfinite(inner()),
    }

    def run(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (applied(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=8)[0][0]

    found = jax.jit(lambda: {name: run(tx) for name, tx in forms.items()})()
    for other in found.values():
        for name in "ab":
            # Other bits agree in six of ten elements. Programs may differ in a last digit, and then
            # a code or two.
            assert np.mean(np.asarray(other[name] == found["chain"][name])) > 0.99


def test_each_member_of_a_vmap_can_have_bits_of_its_own():
    params = jnp.full((64, 64), 1.25, jnp.bfloat16)

    def step(seed):
        tx = aj.chain(
            aj.adam(1e-3, storage=storage.Codes(seed=seed)), aj.round_stochastically(seed)
        )
        updates, state = tx.update(jnp.full((64, 64), 0.3), tx.init(params), params)
        return applied(params, updates), state[0][0].mu, state[0][0].nu

    together = jax.jit(jax.vmap(step))(jnp.arange(3))
    for found in together:
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert 0.1 < np.mean(np.asarray(found[one] == found[other])) < 0.9
    for alone, found in zip(
        jax.jit(lambda: step(2))(), together, strict=True
    ):  # a number is the seed that it is traced
        assert np.mean(np.asarray(alone == found[2])) > 0.999
