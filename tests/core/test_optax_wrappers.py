"""Every optimizer works under Optax's wrappers.

The oracle is Optax's own optimizer under the same wrapper, or the wrapper's meaning written out.
All wrappers, or all optimizers, are in one program, which compiles faster than one for each.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from fitted import DATA, RATE, TWINS, loss, scanned, start, together
from helpers import QUICKLY, avals

import adam_jax

WEIGHTS = {"w": True, "b": False}
WRAPPERS = {
    "alone": lambda tx: tx,
    "clip_by_global_norm": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "add_decayed_weights": lambda tx: optax.chain(optax.add_decayed_weights(0.1), tx),
    "scale_by_schedule": lambda tx: optax.chain(
        tx, optax.scale_by_schedule(optax.linear_schedule(1.0, 0.1, 20))
    ),
    "keep_params_nonnegative": lambda tx: optax.chain(tx, optax.keep_params_nonnegative()),
    "masked": lambda tx: optax.masked(tx, WEIGHTS),
    "masked_by_function": lambda tx: optax.masked(
        tx, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    ),
    "multi_transform": lambda tx: optax.multi_transform(
        {"in": tx, "out": optax.sgd(0.01)}, {"w": "in", "b": "out"}
    ),
    "partition": lambda tx: optax.partition(
        {0: tx, 1: optax.chain(tx, optax.scale(0.5))}, {"w": 0, "b": 1}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 3).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step < 10),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1, 0.9),
    "sam": lambda tx: optax.contrib.sam(
        tx, optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    ),
    "freeze": lambda tx: optax.chain(tx, optax.freeze(WEIGHTS)),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=WEIGHTS),
}
WRAPPERS = {
    name: wrap
    for name, wrap in WRAPPERS.items()
    if name not in ("freeze", "selective_transform") or hasattr(optax, name)
}
"""Those that this Optax has."""


@functools.cache
def wrapped():
    """By wrapper: the parameters after our run and after Optax's."""

    def run(tx):
        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (start(), tx.init(start())), DATA)[0][0]

    return jax.jit(
        lambda: {name: [run(wrap(tx)) for tx in TWINS] for name, wrap in WRAPPERS.items()},
        compiler_options=QUICKLY,
    )()


@pytest.mark.parametrize("name", WRAPPERS)
# Optax before 0.2.6 warns of itself, under a JAX of its time.
@pytest.mark.filterwarnings("ignore:unzip2 was deprecated:DeprecationWarning")
def test_a_wrapper_does_with_us_what_it_does_with_optax(name, agree, x64, standard_promotion):
    ours, theirs = wrapped()[name]
    agree(ours, theirs, rtol=1e-8)
    assert not np.allclose(ours["b"], start()["b"]) or not np.allclose(ours["w"], start()["w"])


def test_lookahead_synchronizes_fast_and_slow(agree, x64, standard_promotion):
    def run(tx):
        tx = optax.lookahead(tx, sync_period=5, slow_step_size=0.5)
        params = optax.LookaheadParams.init_synced(start())

        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params.fast, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), DATA)[0][0]

    ours, theirs = jax.jit(lambda: [run(tx) for tx in TWINS])()
    agree(ours, theirs, rtol=1e-8)
    agree(ours.fast, ours.slow)  # 40 steps end on a synchronization


@functools.cache
def nested():
    """By member:

    `w` after a run in the nest, and after one on the gradients that reach the member there.
    """
    data = jnp.asarray(DATA[:20])
    means = np.mean(np.delete(DATA[:20], [10, 11], axis=0).reshape(-1, 2, 3), axis=1)
    clipped = means / np.maximum(1, np.linalg.norm(means, axis=1, keepdims=True) * np.sqrt(2))

    def run(tx, params, grads, share=1.0):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (
                optax.apply_updates(params, jax.tree.map(lambda u: share * u, updates)),
                state,
            ), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]

    def both(member):
        inner = optax.chain(optax.clip_by_global_norm(1.0), member(0.1), optax.scale(0.5))
        nest = optax.apply_if_finite(
            optax.MultiSteps(optax.masked(inner, WEIGHTS), 2).gradient_transformation(), 5
        )
        poisoned = data.at[10:12].set(jnp.nan)
        found = run(nest, start(), {"w": jnp.stack([poisoned, poisoned], -1), "b": poisoned})["w"]
        return found, run(
            member(0.1),
            start()["w"],
            jnp.asarray(np.stack([clipped, clipped], -1), jnp.float32),
            0.5,
        )

    return together(both)


def test_every_member_under_a_nest_of_wrappers_is_the_member_on_the_gradients_that_reach_it(
    member, agree, standard_promotion
):
    agree(*nested()[member.__name__], rtol=1e-4, atol=1e-6)


def test_inject_hyperparams_scanned(train, agree, x64, standard_promotion):
    found, state = train(
        optax.inject_hyperparams(adam_jax.adamw)(RATE, weight_decay=0.1), start(), DATA, loss
    )
    agree(found, train(TWINS[1], start(), DATA, loss)[0], rtol=1e-8)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], RATE(39), rtol=1e-6)


def walk(tx, params, steps=3):
    """Unjitted steps along gradients that grow: -> (params, state)."""
    state = tx.init(params)
    for i in range(1, steps + 1):
        updates, state = tx.update(
            jax.tree.map(functools.partial(jnp.multiply, float(i)), params), state, params
        )
        params = optax.apply_updates(params, updates)
    return params, state


@functools.cache
def injected():
    def both(member):
        static = ("clip_value_fn",) if member is adam_jax.adopt else ()
        tx = optax.inject_hyperparams(member, static_args=static)(learning_rate=RATE)
        return scanned(tx, start())[0], scanned(member(RATE), start())[0]

    return together(both)


def test_inject_hyperparams_gives_every_member_its_schedule(member, agree, x64, standard_promotion):
    agree(*injected()[member.__name__], rtol=1e-7)


def test_a_hyperparameter_written_into_an_injected_state_is_obeyed(agree, standard_promotion):
    tx, params = optax.inject_hyperparams(adam_jax.adamw)(learning_rate=0.1), start()
    state = tx.init(params)
    state.hyperparams["learning_rate"] = jnp.float32(0.025)
    first = jax.tree.map(
        lambda after, before: after - before, walk(optax.adamw(0.025), params, 1)[0], params
    )
    agree(jax.jit(tx.update)(params, state, params)[0], first, rtol=1e-5)


def test_tree_get_finds_the_moments(member):
    params = start()
    state = optax.chain(optax.clip(1.0), member(0.1)).init(params)
    if member is not adam_jax.rmsprop:
        assert avals(optax.tree.get(state, "mu")) == avals(params)
    if member not in (adam_jax.momentum, adam_jax.adam_mini):
        assert avals(optax.tree.get(state, "nu")) == avals(params)


def test_map_params_maps_the_moments_and_nothing_else(member, agree):
    tx, params = member(0.1), start()
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, jnp.full_like, state, {"w": 7.0, "b": 8.0})
    for (path, leaf), before in zip(
        jax.tree_util.tree_leaves_with_path(mapped), jax.tree.leaves(state), strict=True
    ):
        name = jax.tree_util.keystr(path)
        label = 7.0 if "['w']" in name else 8.0 if "['b']" in name else None
        np.testing.assert_array_equal(
            leaf, before if label is None else np.full(before.shape, label)
        )
