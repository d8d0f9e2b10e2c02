"""Every member goes wherever an Optax transformation goes: under Optax's wrappers, in Flax,
Equinox, JAX's transformations.

The oracle is Optax's own member under the same wrapper, or the wrapper's meaning written out; each
runs a jitted, scanned loop. All members, or all wrappers, are in one program: it compiles several
times faster than one program for each."""

import functools
import inspect

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import QUICKLY, avals
from jax import export

import adam_jax

RATE = optax.cosine_decay_schedule(0.1, 30)
WEIGHTS = {"w": True, "b": False}
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


# Under Optax's wrappers

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
TWINS = (adam_jax.adamw(RATE, weight_decay=0.1), optax.adamw(RATE, weight_decay=0.1))


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


def scanned(tx, params, steps=3):
    """The same in a scan."""

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(jax.tree.map(lambda p: i * p, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(1.0, steps + 1))[0]


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


# In Flax and Equinox


def test_flax_train_state(agree, standard_promotion):
    model = nn.Dense(2)
    x = jnp.asarray(DATA)

    def run(tx):
        state = TrainState.create(
            apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=tx
        )

        def step(state, batch):
            grads = jax.grad(lambda p: jnp.sum((state.apply_fn(p, batch) - 1) ** 2))(state.params)
            return state.apply_gradients(grads=grads), None

        return jax.jit(lambda state: jax.lax.scan(step, state, x)[0])(state)

    ours, theirs = (run(tx) for tx in TWINS)
    agree(ours.params, theirs.params, rtol=1e-4)
    assert ours.step == len(DATA)


def test_nnx_optimizer(agree, standard_promotion):
    def run(tx):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        graph, variables = nnx.split((model, optimizer))

        def step(variables, x):
            model, optimizer = nnx.merge(graph, variables)
            optimizer.update(model, nnx.grad(lambda model: jnp.sum((model(x) - 1) ** 2))(model))
            return nnx.state((model, optimizer)), None

        nnx.update(
            (model, optimizer),
            jax.jit(lambda v, x: jax.lax.scan(step, v, x)[0])(variables, jnp.asarray(DATA)),
        )
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    agree(*(run(tx) for tx in TWINS), rtol=1e-4)


def test_equinox_filters_and_an_equal_transformation_does_not_retrace(agree, standard_promotion):
    traces = []

    @eqx.filter_jit
    def loop(model, tx, x):
        traces.append(tx)
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def step(carry, x):
            params, state = carry
            grads = eqx.filter_grad(
                lambda params: jnp.sum((eqx.combine(params, static)(x) - 1) ** 2)
            )(params)
            updates, state = tx.update(grads, state, params)
            return (eqx.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), x)[0][0]

    model, x = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), jnp.asarray(DATA)
    ours = [loop(model, adam_jax.adamw(0.01), x) for _ in range(2)][-1]
    assert len(traces) == 1
    agree(ours, loop(model, optax.adamw(0.01), x), rtol=1e-4, atol=1e-6)
    loop(model, adam_jax.adamw(0.02), x)
    assert len(traces) == 3


# Through JAX's transformations


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


def numbers(member):
    """The hyperparameters that have a numeric default: name -> value. Constants are none."""
    constants = ("initial_scale", "initial_accumulator_value", "a", "b")
    arguments = inspect.signature(member).parameters.values()
    return {
        a.name: a.default for a in arguments if type(a.default) is float and a.name not in constants
    }


IN_THE_STATE = {
    ("momentum", "momentum"): "b1",
    ("rmsprop", "decay"): "b2",
    ("rmsprop", "eps"): "eps_root",
    ("adamax", "eps"): "nu_eps",
    ("adamaxw", "eps"): "nu_eps",
    ("adabelief", "eps_root"): "nu_eps",
}
"""What the stages call a hyperparameter, where it is not as the optimizer does."""


def chosen(member):
    return {"learning_rate": 0.1, **numbers(member)}


@functools.cache
def given():
    """By member: parameters and state after a run whose hyperparameters are numbers, arguments,
    schedules.
    """
    arguments = {name: chosen(member) for name, member in MEMBERS.items()}

    def run(member, traced):
        schedules = {
            name: lambda count, value=value: value + 0 * (count / 1)
            for name, value in chosen(member).items()
        }
        settable = {name: adam_jax.settable(value) for name, value in chosen(member).items()}
        ways = {
            "numbers": chosen(member),
            "traced": traced[member.__name__],
            "schedules": schedules,
            "settable": settable,
        }
        return {name: scanned(member(**values), start()) for name, values in ways.items()}

    return together(run, arguments)


def test_every_hyperparameter_may_be_a_number_traced_or_a_schedule(member, agree):
    assert len(chosen(member)) > 1
    number, traced, schedule = (
        given()[member.__name__][way] for way in ("numbers", "traced", "schedules")
    )
    assert avals(number) == avals(traced) == avals((start(), member(0.1).init(start())))
    agree(traced, number, rtol=2e-4, atol=1e-6)  # 1 - 0.999 has four digits in float32
    agree(schedule[0], number[0], rtol=2e-4, atol=1e-6)  # the state has counters besides
    settable = given()[member.__name__]["settable"]
    agree(settable[0], number[0], rtol=2e-4, atol=1e-6)
    for name, value in chosen(member).items():
        kept = optax.tree.get(settable[1], IN_THE_STATE.get((member.__name__, name), name))
        np.testing.assert_array_equal(kept, np.float32(value))


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


def courses(member):
    each = {
        name: lambda t, value=value: value * (1 - t / 100)
        for name, value in numbers(member).items()
    }
    return {"learning_rate": lambda t: 0.1 / (1 + t / 7)} | each


@functools.cache
def scheduled():
    return together(
        lambda member: scanned(optax.chain(optax.clip(1.0), member(**courses(member))), start())[1]
    )


def test_hyperparameters_are_those_of_the_last_step(member):
    found = adam_jax.hyperparameters(scheduled()[member.__name__], member(**courses(member)))
    np.testing.assert_allclose(found["learning_rate"], 0.1 / (1 + 2 / 7), rtol=1e-6)
    for name, course in courses(member).items():
        assert any(np.isclose(value, course(2), rtol=1e-6, atol=0) for value in found.values()), (
            name,
            found,
        )


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
