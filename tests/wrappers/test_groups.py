"""`by_path`: a group fares as its own transformation alone on its leaves, in any tree; a frozen one
has no state and no step.

The oracles are that transformation on the sub-tree alone, and `optax.partition`.
"""

import copy
import functools
import itertools
import pickle
import re

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from helpers import avals, bits, draw_tree, refused, same

import adam_jax as aj
from adam_jax import by_path
from adam_jax._core.paths import path_of, paths

SHAPES = {
    "embed": {"table": (64, 80)},
    "encoder": {"layer_0": {"bias": (3,), "kernel": (2, 3)}, "layer_1": {"bias": (3,)}},
    "head": {"kernel": (64, 80)},
}


def tree(seed, shapes=SHAPES):
    return draw_tree(seed, shapes)


PARAMS = tree(0)
BIAS = r".*/bias"
DEFAULT = aj.adamw(0.1, weight_decay=0.1)


def run(tx, params, grads, steps=3, jit=lambda f: f):
    """Parameters and state after some steps along gradients that change; unjitted, which compiles
    each operation but once.
    """
    state, update = tx.init(params), jit(tx.update)
    for i in range(1, steps + 1):
        updates, state = update(
            jax.tree.map(lambda g, i=i: g * jnp.asarray(i, g.dtype), grads), state, params
        )
        params = optax.apply_updates(params, updates)
    return params, state


def named(tree):
    """Leaves by path."""
    return dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))


def only(pattern, params, others=()):
    """The sub-tree of a group, as a dict by path."""
    keep = lambda path: (
        re.fullmatch(pattern, path) and not any(re.fullmatch(other, path) for other in others)
    )
    return {path: leaf for path, leaf in named(params).items() if keep(path)}


# A group is its transformation on its leaves alone

halved = optax.linear_schedule(0.1, 0.01, 5)
GROUPS = {
    "decay": (DEFAULT, {"weight_decay": 0.0}, aj.adamw(0.1, weight_decay=0.0)),
    "betas": (
        DEFAULT,
        {"b1": 0.5, "b2": 0.9, "eps": 1e-3},
        aj.adamw(0.1, 0.5, 0.9, 1e-3, weight_decay=0.1),
    ),
    "rate": (DEFAULT, {"learning_rate": 0.3}, aj.adamw(0.3, weight_decay=0.1)),
    "schedule": (DEFAULT, {"learning_rate": halved}, aj.adamw(halved, weight_decay=0.1)),
    "multiplier": (DEFAULT, {"learning_rate_multiplier": 0.5}, aj.adamw(0.05, weight_decay=0.1)),
    "multiplier_of_numpy": (
        DEFAULT,
        {"learning_rate_multiplier": np.float64(0.5)},
        aj.adamw(0.05, weight_decay=0.1),
    ),
    "multiplied_schedule": (
        aj.adam(halved),
        {"learning_rate_multiplier": 0.5},
        aj.adam(lambda count: halved(count) * 0.5),
    ),
    "both": (
        DEFAULT,
        {"learning_rate": 0.4, "learning_rate_multiplier": 0.5},
        aj.adamw(0.2, weight_decay=0.1),
    ),
    "storage": (
        DEFAULT,
        {"storage": "bfloat16"},
        aj.adamw(0.1, weight_decay=0.1, storage="bfloat16"),
    ),
    "nothing": (DEFAULT, {}, DEFAULT),
    "other": (DEFAULT, aj.yogi(0.2), aj.yogi(0.2)),
    "chain": (
        aj.adam(0.1),
        aj.chain(optax.clip(0.1), aj.momentum(0.2)),
        aj.chain(optax.clip(0.1), aj.momentum(0.2)),
    ),
    "torch": (
        aj.presets.torch.adam(0.1),
        {"learning_rate_multiplier": 2.0},
        aj.presets.torch.adam(0.2),
    ),
    "optax": (aj.adam(0.1), optax.sgd(0.2, 0.9), optax.sgd(0.2, 0.9)),
    "of_optax_alone": (optax.sgd(0.1), optax.sgd(0.2, 0.9), optax.sgd(0.2, 0.9)),
    "stage": (
        aj.scale_by_learning_rate(0.1),
        {"learning_rate_multiplier": 0.5},
        aj.scale_by_learning_rate(0.05),
    ),
}


@pytest.mark.parametrize(("default", "group", "alone"), GROUPS.values(), ids=GROUPS)
def test_a_group_moves_as_its_transformation_alone(default, group, alone):
    grads = tree(1)
    found, state = run(by_path({BIAS: group}, default), PARAMS, grads)
    for pattern, tx, others in [(BIAS, alone, ()), (".*", default, (BIAS,))]:
        expected, its = run(tx, only(pattern, PARAMS, others), only(pattern, grads, others))
        same(only(pattern, found, others), expected)
        inner = state.inner_states[BIAS if pattern == BIAS else "default"]
        assert list(bits(inner).values()) == list(bits(its).values())


def test_8_bits_for_one_group():
    """The random bits are those of a leaf of this path, in a group as alone."""
    found, state = run(
        by_path({"embed/.*": {"storage": "8bit"}}, aj.adam(0.1)), PARAMS, tree(1), jit=jax.jit
    )
    alone, its = ({"embed": whole["embed"]} for whole in (PARAMS, tree(1)))
    expected, _ = run(aj.adam(0.1, storage="8bit"), alone, its, jit=jax.jit)
    same(found["embed"], expected["embed"])
    assert state.inner_states["embed/.*"][0].mu["embed"]["table"].dtype.itemsize == 1
    assert state.inner_states["default"][0].mu["head"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("theirs", [optax.adam, optax.lion, optax.adafactor])
def test_groups_of_optax_are_its_partition(theirs, standard_promotion):
    grads = tree(1)
    labels = jax.tree.map(lambda p: "vector" if p.ndim == 1 else "rest", PARAMS)
    expected, _ = run(
        optax.partition({"vector": theirs(0.1), "rest": optax.sgd(0.1)}, labels), PARAMS, grads
    )
    same(run(by_path({BIAS: theirs(0.1)}, optax.sgd(0.1)), PARAMS, grads)[0], expected)


def test_a_traced_multiplier_and_rate():
    """Members of a vmap, each with numbers of its own; nothing is traced twice."""
    grads, traces = tree(1), []

    @jax.jit
    @jax.vmap
    def final(rate, factor):
        traces.append(rate)
        tx = by_path({BIAS: {"learning_rate_multiplier": factor}}, aj.adam(rate))
        updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
        return updates

    found = final(jnp.array([0.1, 0.2]), jnp.array([0.5, 0.25]))
    final(jnp.array([0.3, 0.4]), jnp.array([0.5, 0.25]))
    assert len(traces) == 1
    for i, (rate, factor) in enumerate([(0.1, 0.5), (0.2, 0.25)]):
        tx = by_path({BIAS: aj.adam(rate * factor)}, aj.adam(rate))
        expected, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-6), found, expected
        )


@pytest.mark.parametrize(
    "factor", [0.5, np.float64(0.5), jnp.float32(0.5)], ids=["number", "numpy", "array"]
)
def test_a_multiplied_schedule_of_arrays(factor):
    tx = by_path(
        {BIAS: {"learning_rate_multiplier": factor}},
        aj.adam(lambda count: jnp.float32(0.1) / (count + 1).astype(jnp.float32)),
    )
    _, state = run(tx, PARAMS, tree(1), steps=2)
    rates = aj.hyperparameters(state, tx)
    assert rates[f"{BIAS}/learning_rate"] == rates["default/learning_rate"] / 2


# Frozen leaves


AVERAGED = lambda tx: aj.chain(tx, aj.stages.average_parameters(0.9))


@pytest.mark.parametrize(
    ("dtype", "around"),
    [
        (jnp.float32, lambda tx: tx),
        (jnp.bfloat16, AVERAGED),
        (jnp.complex64, AVERAGED),
        (jnp.bfloat16, aj.skip_nonfinite),
        (jnp.complex64, aj.skip_nonfinite),
    ],
    ids=["float32", "bfloat16 chain", "complex64 chain", "bfloat16 guard", "complex64 guard"],
)
def test_no_bit_of_a_frozen_leaf_changes(dtype, around):
    start = jnp.asarray([0.0, -0.0, 1.0, -1e-30, 3.0], dtype)
    params = {
        "a": start,
        "b": jnp.asarray(start, jnp.float32 if dtype == jnp.bfloat16 else dtype),
        "n": jnp.arange(3),
        "w": jnp.ones(2),
    }
    grads = {
        "a": jnp.full_like(start, 7),
        "b": jnp.full_like(params["b"], -7),
        "n": np.zeros(3, jax.dtypes.float0),
        "w": jnp.ones(2),
    }
    tx = around(by_path({"a|b|n": "frozen"}, aj.adamw(0.1)))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert bits(params["a"]) == bits(start)
    assert bits(params["b"]) == bits(jnp.asarray(start, params["b"].dtype))
    np.testing.assert_array_equal(params["n"], [0, 1, 2])
    assert updates["n"].dtype == jnp.int32
    assert bits(params["w"]) != bits(jnp.ones(2))


def test_frozen_leaves_have_no_state():
    frozen = by_path({"embed/.*|head/.*": "frozen"}, aj.adam(0.1))
    alone = {"encoder": PARAMS["encoder"]}
    assert aj.state_bytes(frozen, PARAMS).state == aj.state_bytes(aj.adam(0.1), alone).state
    assert len(jax.tree.leaves(frozen.init(PARAMS))) == len(
        jax.tree.leaves(aj.adam(0.1).init(alone))
    )
    everything = by_path({".*": "frozen"}, optax.sgd(0.1))
    assert jax.tree.leaves(everything.init(PARAMS)) == []
    same(run(everything, PARAMS, tree(1))[0], PARAMS)


def test_integer_leaves_outside_of_frozen_groups():
    params, grads = (
        {"n": jnp.arange(3), "w": jnp.ones(3)},
        {"n": np.zeros(3, jax.dtypes.float0), "w": jnp.ones(3)},
    )
    tx = by_path({"w": {"weight_decay": 0.0}}, aj.adamw(0.1))
    for given in (params, None):
        if given is None:
            tx = by_path({"n": "frozen"}, aj.adam(0.1))
        updates, _ = tx.update(grads, tx.init(params), given)
        assert updates["n"].dtype == (jnp.int32 if given else jax.dtypes.float0)
        np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)


# Trees

x, y = jax.random.normal(jax.random.key(0), (8, 2)), jnp.arange(8.0)[:, None]


def test_all_but_some_are_frozen():
    """A head on what was trained before."""
    tx, all_but = (
        by_path({"head/.*": DEFAULT}, "frozen"),
        by_path({"(embed|encoder)/.*": "frozen"}, DEFAULT),
    )
    (found, state), (expected, its) = (run(of, PARAMS, tree(1)) for of in (tx, all_but))
    same(found, expected)
    assert list(state.inner_states) == ["head/.*"]
    assert list(bits(state).values()) == list(bits(its).values())
    stages = {leaf.path: leaf.stages for leaf in aj.describe(tx, PARAMS).leaves}
    assert stages["embed/table"] == ("frozen",) != stages["head/kernel"]
    assert {name.rpartition("/")[0] for name in aj.observations(aj.observe(tx).init(PARAMS))} == {
        "",
        "all",
        "head/.*",
    }


PATTERNS = {r".*/bias": {"learning_rate_multiplier": 0.5}, "first/.*": "frozen"}


class Attention(eqx.Module):
    query: jax.Array
    value: jax.Array


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        boxed = linen.with_partitioning(linen.initializers.lecun_normal(), (None, None))
        x = linen.Dense(3, use_bias=False, name="first", kernel_init=boxed)(x)
        return linen.Dense(1, name="second")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 3, use_bias=False, rngs=rngs)
        self.second = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.second(self.first(x))


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear
    name: str = "net"

    def __call__(self, x):
        return self.second(self.first(x))


# The parameters at the start and after each step.


def linen_steps(tx, steps):
    model = Linen()
    train = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(1), x)["params"], tx=tx
    )
    loss = lambda params: jnp.mean((model.apply({"params": params}, x) - y) ** 2)
    step = jax.jit(lambda train: train.apply_gradients(grads=jax.grad(loss)(train.params)))
    yield train.params
    for _ in range(steps):
        train = step(train)
        yield train.params


def nnx_steps(tx, steps):
    model = Nnx(nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(model))

    yield jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    for _ in range(steps):
        step(model, optimizer)
        yield jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))


def equinox_steps(tx, steps):
    keys = jax.random.split(jax.random.key(1))
    model = Equinox(
        eqx.nn.Linear(2, 3, use_bias=False, key=keys[0]), eqx.nn.Linear(3, 1, key=keys[1])
    )
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda model: jnp.mean((jax.vmap(model)(x) - y) ** 2))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    yield eqx.filter(model, eqx.is_inexact_array)
    for _ in range(steps):
        model, state = step(model, state)
        yield eqx.filter(model, eqx.is_inexact_array)


def dict_steps(tx, steps):
    params = tree(5, {"first": {"kernel": (2, 3)}, "second": {"bias": (1,), "kernel": (3, 1)}})
    loss = lambda p: jnp.mean(
        (x @ p["first"]["kernel"] @ p["second"]["kernel"] + p["second"]["bias"][None] - y) ** 2
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    yield params
    for _ in range(steps):
        params, state = step(params, state)
        yield params


BARE, CHAIN = (lambda tx: tx), (lambda tx: aj.chain(optax.clip(9.0), tx))


@pytest.mark.parametrize(
    ("steps", "around"),
    [
        (dict_steps, CHAIN),
        (linen_steps, BARE),
        (nnx_steps, CHAIN),
        (nnx_steps, BARE),
        (equinox_steps, BARE),
    ],
)
def test_the_same_patterns_on_every_tree(steps, around):
    """In one step of Adam each element moves by the learning rate: which tells its group."""
    before, after, _, last = map(named, steps(around(by_path(PATTERNS, aj.adam(0.1))), 3))
    weight = "weight" if steps is equinox_steps else "kernel"
    assert list(after) == list(before)
    assert {*after} == {f"first/{weight}", f"second/{weight}", "second/bias"}
    moved = {
        path: np.unique(np.round(np.abs(np.asarray(after[path]) - np.asarray(before[path])), 4))
        for path in after
    }
    for now in (after, last):
        same(now[f"first/{weight}"], before[f"first/{weight}"])
    np.testing.assert_allclose(moved[f"second/{weight}"], 0.1, atol=1e-4)
    np.testing.assert_allclose(moved["second/bias"], 0.05, atol=1e-4)
    assert bits(last["second/bias"]) != bits(after["second/bias"])  # goes on from its own state


def test_lists_tuples_and_empty_leaves():
    params = {"a": [jnp.ones(1), (jnp.ones(2), None)], "b": optax.MaskedNode(), "c": {}}
    found, _ = run(by_path({"a/1/0": "frozen"}, aj.adam(0.1)), params, params, steps=1)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    np.testing.assert_array_equal(found["a"][1][0], 1)
    np.testing.assert_allclose(found["a"][0], 0.9)
    bare, _ = run(
        by_path({".*": {"learning_rate": 0.2}}, aj.adam(0.1)), jnp.ones(2), jnp.ones(2), steps=1
    )
    np.testing.assert_allclose(bare, 0.8)


KEYS = jax.tree_util
PATHS = {
    "dict": ({"encoder": {"layer_0": {"bias": 1.0}}}, ["encoder/layer_0/bias"]),
    "sequences": ({"a": [1.0, (2.0,)]}, ["a/0", "a/1/0"]),
    "integer_keys": ({0: {1: 1.0}}, ["0/1"]),
    "bare": (1.0, [""]),
    "empty": ({"a": None, "b": optax.MaskedNode(), "c": 1.0}, ["c"]),
    "dataclass": ({"a": Attention(1.0, 2.0)}, ["a/query", "a/value"]),
    "partitioned": ({"kernel": linen.Partitioned(jnp.ones(2), names=(None,))}, ["kernel"]),
    "box_of_a_dict": (
        {"x": nnx.Param({"value": jnp.ones(1), "b": jnp.ones(1)})},
        ["x/b", "x/value"],
    ),
    "box_alone": (linen.Partitioned(jnp.ones(2), names=(None,)), [""]),
    "nnx": (
        nnx.state(Nnx(nnx.Rngs(0)), nnx.Param),
        ["first/kernel", "second/bias", "second/kernel"],
    ),
    "nnx_pure": (
        nnx.to_pure_dict(nnx.state(Nnx(nnx.Rngs(0)), nnx.Param)),
        ["first/kernel", "second/bias", "second/kernel"],
    ),
}


@pytest.mark.parametrize(("tree", "expected"), PATHS.values(), ids=PATHS)
def test_paths(tree, expected):
    assert paths(tree) == expected


def test_the_path_of_keys():
    key, name, index = KEYS.DictKey, KEYS.GetAttrKey, KEYS.SequenceKey
    assert path_of((key("a"), index(1), name("b"), KEYS.FlattenedIndexKey(2))) == "a/1/b/2"
    assert path_of((key("a"), name("value"))) == path_of((key("a"), name("raw_value"))) == "a"
    assert path_of((name("a"), name("value"))) == "a/value"
    assert path_of(()) == ""


# What is refused

adam = aj.adam(0.1)
AT_ONCE = {
    "no_mapping": (
        lambda: by_path([BIAS], adam),
        TypeError,
        "groups: found ['.*/bias']",
        "expected a mapping",
    ),
    "no_groups": (lambda: by_path({}, adam), ValueError, "groups: found {}", "expected a mapping"),
    "no_string": (
        lambda: by_path({re.compile("a"): "frozen"}, adam),
        TypeError,
        "found the pattern re.compile('a')",
    ),
    "default_as_pattern": (
        lambda: by_path({"default": "frozen"}, adam),
        ValueError,
        "the name of the rest",
        "'default()'",
    ),
    "no_expression": (
        lambda: by_path({"*bias": "frozen"}, adam),
        ValueError,
        "found the pattern '*bias'",
        "nothing to repeat",
    ),
    "frozn": (
        lambda: by_path({"a": "frozn"}, adam),
        ValueError,
        "by_path: 'a': found 'frozn'; expected one of 'frozen'",
    ),
    "ordered": (
        lambda: by_path({"a": "frozen"}, adam, ordered=1),
        ValueError,
        "by_path: ordered: found 1",
    ),
    "no_group": (
        lambda: by_path({"a": None}, adam),
        TypeError,
        "by_path: 'a': found None",
        "such as adam(1e-3)",
    ),
    "uncalled": (lambda: by_path({"a": aj.adam}, adam), TypeError, "did you mean to call it?"),
    "no_default": (lambda: by_path({"a": "frozen"}, 0.1), TypeError, "by_path: default: found 0.1"),
    "default_frozn": (
        lambda: by_path({"a": adam}, "frozn"),
        ValueError,
        "by_path: default: found 'frozn'; expected one of 'frozen'",
    ),
    "all_frozen": (
        lambda: by_path({"a": "frozen"}, "frozen"),
        ValueError,
        "all groups and the default are 'frozen'",
    ),
    "overrides_of_frozen": (
        lambda: by_path({"a": {"b1": 0.5}}, "frozen"),
        TypeError,
        "the overrides {'b1': 0.5} of 'frozen'",
    ),
    "another_name": (
        lambda: by_path({"a": {"learning_rate": 0.5}}, aj.presets.torch.adamw()),
        TypeError,
        "found 'learning_rate'; did you mean lr?",
    ),
    "moments": (
        lambda: by_path({"a": aj.track_moments()}, adam),
        ValueError,
        "by_path: 'a': found track_moments",
        "a whole optimizer",
    ),
    "default_moments": (
        lambda: by_path({"a": "frozen"}, aj.correct_bias()),
        ValueError,
        "by_path: default: found correct_bias()",
    ),
    "misspelt": (
        lambda: by_path({"a": {"wieght_decay": 0.0}}, DEFAULT),
        TypeError,
        "found 'wieght_decay'; did you mean weight_decay?",
    ),
    "unknown": (
        lambda: by_path({"a": {"zzz": 0}}, adam),
        TypeError,
        "found 'zzz'; adam has learning_rate, b1,",
        "learning_rate_multiplier",
    ),
    "no_rate": (
        lambda: by_path({"a": {"learning_rate_multiplier": 2}}, aj.stages.clip_elements(1.0)),
        TypeError,
        "found 'learning_rate_multiplier'; clip_elements has",
    ),
    "chain": (
        lambda: by_path({"a": {"eps": 0.1}}, aj.chain(optax.clip(1.0), adam)),
        TypeError,
        "by_path: 'a': found the overrides {'eps': 0.1} of chain(",
        "around by_path(...)",
    ),
    "wrapper": (
        lambda: by_path({"a": {"eps": 0.1}}, aj.skip_nonfinite(adam)),
        TypeError,
        "the overrides",
        "skip_nonfinite(",
    ),
    "optax": (
        lambda: by_path({"a": {"eps": 0.1}}, optax.adam(0.1)),
        TypeError,
        "the overrides",
        "which has no arguments by name",
    ),
    "value": (lambda: by_path({"a": {"b1": 2.0}}, adam), ValueError, "b1: found 2.0"),
    "schedule_of_multipliers": (
        lambda: by_path({"a": {"learning_rate_multiplier": halved}}, adam),
        TypeError,
        "by_path: 'a': learning_rate_multiplier: found <function",
        "Or give a learning_rate",
    ),
    "nan": (
        lambda: by_path({"a": {"learning_rate_multiplier": np.nan}}, adam),
        ValueError,
        "'a': learning_rate_multiplier: found nan",
    ),
    "some_rates": (
        lambda: by_path({"a": aj.chain(aj.track_moments(), aj.scale_by_moments())}, adam),
        ValueError,
        "'default' applies a learning rate, and 'a', chain(track_moments",
        "uphill",
    ),
}


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [(make, error, says) for make, error, *says in AT_ONCE.values()],
    ids=AT_ONCE,
)
def test_what_cannot_be_is_refused_at_once(make, error, says):
    with refused(error, *says):
        make()


@pytest.mark.parametrize("guarded", [aj.skip_nonfinite, aj.chain], ids=["guard", "chain"])
def test_a_rate_that_cannot_be_seen_may_be_there(guarded):
    """Of Optax, inside of what is ours, and behind it a link that needs to know."""
    tx = by_path({BIAS: guarded(optax.sgd(0.1))}, adam)
    found, _ = run(tx, PARAMS, tree(1), steps=1, jit=jax.jit)
    same(
        only(BIAS, found),
        run(optax.sgd(0.1), only(BIAS, PARAMS), only(BIAS, tree(1)), steps=1, jit=jax.jit)[0],
    )
    sure, guess = (
        aj.chain(tx, aj.stages.cautious()),
        aj.chain(guarded(optax.sgd(0.1)), aj.stages.cautious()),
    )
    found, _ = run(sure, PARAMS, tree(1), steps=1, jit=jax.jit)
    np.testing.assert_allclose(
        named(found)["encoder/layer_0/bias"],
        (PARAMS["encoder"]["layer_0"]["bias"] - 0.1 * tree(1)["encoder"]["layer_0"]["bias"]),
        rtol=1e-6,
    )
    with refused(ValueError, "cautious() does not know whether the learning rate"):
        run(guess, PARAMS, tree(1))
    with refused(ValueError, "clip_update_rms() does not know the one learning rate"):
        run(aj.chain(tx, aj.stages.clip_update_rms()), PARAMS, tree(1))


@pytest.mark.parametrize(
    "how",
    [lambda tx: tx.init(PARAMS), lambda tx: jax.eval_shape(tx.init, PARAMS)],
    ids=["init", "shapes"],
)
@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (
            {"bias": "frozen"},
            [
                "no leaf that 'bias' matches",
                "part of 'encoder/layer_0/bias': did you mean '.*/bias'?",
                "'embed/table'",
            ],
        ),
        ({"bias|table": "frozen"}, ["did you mean '.*(bias|table).*'?"]),
        (
            {"tail/.*": "frozen"},
            [
                "no leaf that 'tail/.*' matches",
                "match of the whole path. Paths are 'embed/table', 'encoder",
            ],
        ),
        (
            {BIAS: "frozen", "encoder/.*": adam},
            [
                "2 patterns that match 'encoder/layer_0/bias': '.*/bias', 'encoder/.*'",
                "ordered=True",
            ],
        ),
    ],
)
def test_patterns_that_match_nothing_or_together(groups, says, how):
    with refused(ValueError, "by_path: found", *says):
        how(by_path(groups, adam))


def test_many_paths_are_not_all_shown():
    with refused(ValueError, "'07' and 2 more."):
        by_path({"x": "frozen"}, adam).init({f"{i:02}": 1.0 for i in range(10)})


@pytest.mark.parametrize(("first", "second"), [(BIAS, "encoder/.*"), ("encoder/.*", BIAS)])
def test_the_first_of_ordered_patterns_takes_a_leaf(first, second):
    tx = by_path({first: "frozen", second: {"learning_rate": 0.5}}, aj.adam(0.1), ordered=True)
    found, _ = run(tx, PARAMS, PARAMS, steps=1)
    rates = {
        path: float(np.abs(found - start).max())
        for (path, found), start in zip(named(found).items(), jax.tree.leaves(PARAMS), strict=True)
    }
    for path, moved in rates.items():
        its = 0.0 if re.fullmatch(first, path) else 0.5 if re.fullmatch(second, path) else 0.1
        assert moved == pytest.approx(its, rel=1e-4), path


def test_trees_and_states_that_do_not_fit():
    tx = by_path({BIAS: "frozen"}, adam)
    state = tx.init(PARAMS)
    with refused(
        ValueError,
        "by_path: update: by_path(",
        "the states of 4 stages (TrackMeanSquareState",
        "convert_state",
    ):
        tx.update(PARAMS, adam.init(PARAMS), PARAMS)
    with refused(
        ValueError, f"the groups {BIAS!r}, 'default', where it has 'default'", "convert_state"
    ):
        tx.update(PARAMS, by_path({BIAS: adam}, adam).init(PARAMS), PARAMS)
    less = {"encoder": PARAMS["encoder"]}
    with refused(ValueError, "params", "['embed']['table']"):
        tx.update(PARAMS, state, less)
    with refused(ValueError, "without a gradient", "['embed']['table']"):
        tx.update(less, state, less)


# A value


def test_it_is_a_value():
    made = lambda **more: by_path(
        {"a.*": {"eps": 0.1}, "b": "frozen", "c": optax.sgd(0.1)}, aj.adam(0.1), **more
    )
    ours = lambda: by_path(
        {"a.*": {"eps": 0.1}, "b": "frozen", "c": aj.yogi(0.1)}, aj.adam(0.1), ordered=True
    )
    assert repr(ours()) == (
        "by_path(groups={'a.*': {'eps': 0.1}, 'b': 'frozen', 'c': yogi(learning_rate=0.1, b1=0.9, "
        "b2=0.999, eps=0.001)}, default=adam(learning_rate=0.1, b1=0.9, b2=0.999, eps=1e-08, "
        "eps_root=0.0), ordered=True)"
    )
    assert "'c': <" in repr(made())
    assert "of optax>" in repr(made())
    again = [
        eval(repr(ours()), vars(aj)),
        pickle.loads(pickle.dumps(ours())),
        copy.deepcopy(ours()),
    ]
    assert all(tx == ours() and hash(tx) == hash(ours()) for tx in again)
    turned = by_path(
        {"c": aj.yogi(0.1), "b": "frozen", "a.*": {"eps": 0.1}}, aj.adam(0.1), ordered=True
    )
    other = by_path(
        {"a.*": {"eps": 0.2}, "b": "frozen", "c": aj.yogi(0.1)}, aj.adam(0.1), ordered=True
    )
    assert len({ours(), turned, other, by_path({"b": "frozen"}, aj.adam(0.1))}) == 4


def test_a_mapping_that_changes_later_changes_nothing():
    groups = {BIAS: {"learning_rate": 0.2}}
    tx = by_path(groups, aj.adam(0.1))
    groups[BIAS]["learning_rate"], groups["head/.*"] = 0.3, "frozen"
    unchanged = by_path({BIAS: {"learning_rate": 0.2}}, aj.adam(0.1))
    assert (tx, repr(tx)) == (unchanged, repr(unchanged))
    assert bits(run(tx, PARAMS, PARAMS, 1)[0]["head"]["kernel"]) != bits(PARAMS["head"]["kernel"])


def test_equal_ones_as_a_static_argument_are_traced_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def init(tx, params):
        traces.append(tx)
        return tx.init(params)

    for _ in range(2):
        init(
            by_path(
                {BIAS: {"learning_rate_multiplier": 0.5}, "head/.*": "frozen"}, aj.adam(halved)
            ),
            PARAMS,
        )
    assert len(traces) == 1


# With others


def test_between_links(standard_promotion):
    """Clipped by the norm of all gradients; rounded and averaged as one."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = aj.chain(
        optax.clip_by_global_norm(1.0),
        by_path({BIAS: {"learning_rate": 0.05}, "embed/.*": "frozen"}, aj.adam(0.1)),
        aj.round_stochastically(),
        aj.stages.average_parameters(0.9),
    )
    found, state = run(tx, half, half, steps=2, jit=jax.jit)
    same(found["embed"], half["embed"])
    np.testing.assert_array_equal(
        aj.stages.averaged_parameters(state)["embed"]["table"], half["embed"]["table"]
    )
    norm = np.sqrt(sum(float(jnp.sum(p.astype(jnp.float32) ** 2)) for p in jax.tree.leaves(half)))
    mu = state[1].inner_states[BIAS][0].mu["encoder"]["layer_0"]["bias"]
    g = half["encoder"]["layer_0"]["bias"].astype(jnp.float32)
    np.testing.assert_allclose(mu, (0.09 + 0.1 * 1) * g / norm, rtol=2e-2)


def test_a_frozen_minus_zero_is_not_rounded_to_zero(standard_promotion):
    params = {"a": jnp.asarray([-0.0, 0.0, 1.0], jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
    for link in (aj.round_stochastically(), aj.compensate()):
        found, _ = run(
            aj.chain(by_path({"a": "frozen"}, aj.adam(0.1)), link),
            params,
            params,
            steps=2,
            jit=jax.jit,
        )
        assert bits(found["a"]) == bits(params["a"])


def test_clip_update_rms_behind_several_rates_is_refused():
    several = by_path({BIAS: {"weight_decay": 0.0}}, aj.adamw(0.1))
    with refused(
        ValueError,
        "clip_update_rms() does not know",
        "groups with rates of their own",
        "Put it before",
    ):
        run(aj.chain(several, aj.stages.clip_update_rms()), PARAMS, tree(1))
    one = by_path({BIAS: "frozen"}, aj.momentum(0.1))
    found, _ = run(
        aj.chain(one, aj.stages.clip_update_rms(0.5)),
        {"a": {"bias": jnp.ones(2), "w": jnp.ones(2)}},
        {"a": {"bias": jnp.ones(2), "w": jnp.full(2, 4.0)}},
        steps=1,
    )
    np.testing.assert_allclose(found["a"]["w"], 1 - 0.1 * 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "groups",
    [{BIAS: {"learning_rate": 0.2}}, {BIAS: optax.sgd(0.1, 0.9), "head/.*": "frozen"}],
    ids=["ours", "optax"],
)
def test_a_skipped_step_changes_no_bit(groups):
    tx = aj.skip_nonfinite(by_path(groups, aj.adamw(0.1)))
    params, state = run(tx, PARAMS, tree(1), steps=2)
    poison = jax.tree.map(lambda g: g.at[0].set(jnp.nan), tree(2))
    updates, after = jax.jit(tx.update)(poison, state, params)
    same(optax.apply_updates(params, updates), params)
    same(after.inner_state, state.inner_state)
    assert after.skipped == 1


def test_a_donated_step_copies_nothing():
    params = tree(0, {"a": {"bias": (512,), "w": (256, 512)}, "b": {"w": (256, 512)}})
    tx = by_path(
        {BIAS: {"weight_decay": 0.0}, "b/.*": {"learning_rate_multiplier": 0.5}}, aj.adamw(0.1)
    )

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 512
    assert memory.alias_size_in_bytes >= 3 * aj.state_bytes(tx, params).parameters


def test_cautious_inside_a_group_knows_its_gradient():
    careful = aj.chain(aj.adam(0.1), aj.stages.cautious())
    grads = tree(1)
    expected, _ = run(careful, only(BIAS, PARAMS), only(BIAS, grads))
    for tx in (
        by_path({BIAS: careful}, aj.adam(0.1)),
        aj.chain(optax.clip(9.0), by_path({BIAS: careful}, aj.adam(0.1))),
    ):
        same(only(BIAS, run(tx, PARAMS, grads)[0]), expected)
    theirs = optax.chain(aj.adam(0.1), aj.stages.cautious(after_learning_rate=True))
    tx = by_path({BIAS: theirs}, aj.adam(0.1))
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, gradient=grads)
    alone, _ = theirs.update(
        only(BIAS, grads),
        theirs.init(only(BIAS, PARAMS)),
        only(BIAS, PARAMS),
        gradient=only(BIAS, grads),
    )
    same(only(BIAS, updates), alone)


@pytest.mark.parametrize("mask", ["tree", "function", "matrices"])
def test_masks_over_all_parameters(mask):
    decays = jax.tree.map(lambda p: p.ndim > 1, PARAMS)
    given = {
        "tree": decays,
        "function": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        "matrices": mask,
    }[mask]
    found, _ = run(
        by_path({"encoder/layer_0/.*": {"b1": 0.8}}, aj.adamw(0.1, weight_decay=0.5, mask=given)),
        PARAMS,
        tree(1),
    )
    expected, _ = run(aj.adamw(0.1, weight_decay=0.5, mask=decays), PARAMS, tree(1))
    same(found["encoder"]["layer_1"], expected["encoder"]["layer_1"])
    b1, _ = run(aj.adamw(0.1, 0.8, weight_decay=0.5, mask=decays), PARAMS, tree(1))
    same(found["encoder"]["layer_0"], b1["encoder"]["layer_0"])


def test_extra_arguments_reach_groups():
    """Those of the parameters' structure as the group's part of them, all others as they are."""
    seen = {}

    def update(updates, state, params=None, *, weights, loss, **extra):
        seen.update(weights=weights, loss=loss)
        return jax.tree.map(jnp.multiply, updates, weights), state

    mine = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = aj.chain(optax.clip(9.0), by_path({BIAS: mine}, optax.sgd(0.1)))
    updates, _ = tx.update(tree(1), tx.init(PARAMS), PARAMS, weights=tree(2), loss=3.0)
    assert (
        only(BIAS, seen["weights"]).keys()
        == named(seen["weights"]).keys()
        == only(BIAS, PARAMS).keys()
    )
    assert seen["loss"] == 3.0
    same(only(BIAS, updates), jax.tree.map(jnp.multiply, only(BIAS, tree(1)), only(BIAS, tree(2))))
    noting = optax.GradientTransformationExtraArgs(
        mine.init, lambda updates, state, params, loss: (seen.update(bare=loss), state)
    )
    bare = by_path({".*": optax.sgd(0.1)}, noting)
    bare.update(jnp.ones(2), bare.init(jnp.ones(2)), jnp.ones(2), loss=4.0)
    assert seen["bare"] == 4.0


def test_groups_inside_groups():
    inner = by_path({BIAS: {"learning_rate": 0.2}}, aj.adam(0.1))
    found, _ = run(
        by_path({"head/.*": "frozen", "encoder/.*": inner}, aj.yogi(0.1)), PARAMS, tree(1)
    )
    same(found["encoder"], run(inner, {"e": PARAMS["encoder"]}, {"e": tree(1)["encoder"]})[0]["e"])


# The state

NAMED = by_path(
    {BIAS: {"learning_rate": 0.2, "storage": "bfloat16"}, "head/.*": "frozen"}, aj.adamw(0.1)
)


@pytest.mark.parametrize("precision", ["float32", "x64"])
def test_shapes_and_scan(precision, request):
    if precision == "x64":
        request.getfixturevalue("x64")
    params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), float), PARAMS)
    state = NAMED.init(params)
    assert jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(NAMED.init, params)
    ) == avals(state)

    def step(carry, _):
        params, state = carry
        updates, state = NAMED.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    (after, last), _ = jax.jit(lambda: jax.lax.scan(step, (params, state), length=3))()
    assert avals((after, last)) == avals((params, state))
    assert all(
        int(leaf) == 3
        for path, leaf in jax.tree_util.tree_leaves_with_path(last)
        if ".step" in jax.tree_util.keystr(path)
    )
    assert bits(after["encoder"]["layer_0"]["bias"]) != bits(params["encoder"]["layer_0"]["bias"])


further = jax.jit(NAMED.update)


@functools.cache
def named_run():
    return run(NAMED, PARAMS, tree(1), jit=jax.jit)


def test_hyperparameters_by_group():
    rates = aj.hyperparameters(named_run()[1], NAMED)
    assert rates[f"{BIAS}/learning_rate"] == jnp.float32(0.2)
    assert rates["default/learning_rate"] == jnp.float32(0.1)
    assert not any("head" in name for name in rates)


def test_reset_of_a_group():
    _, state = named_run()
    fresh = aj.reset(state, NAMED, match=re.escape(f"['{BIAS}']"))
    same(fresh.inner_states["default"], state.inner_states["default"])
    same(fresh.inner_states[BIAS][0].mu, NAMED.init(PARAMS).inner_states[BIAS][0].mu)
    every = aj.reset(state, NAMED)
    for part, its in zip(jax.tree.leaves(every), jax.tree.leaves(NAMED.init(PARAMS)), strict=True):
        assert part.shape == its.shape
    nothing_left = by_path({"embed/.*|encoder/.*": adam, "head/.*": {"b1": 0.5}}, adam)
    aj.reset(nothing_left.init(PARAMS), nothing_left)  # the rest is empty


def test_shardings_of_groups():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shardings = aj.state_shardings(NAMED, PARAMS, jax.tree.map(lambda p: cut, PARAMS))
    assert jax.tree.structure(shardings) == jax.tree.structure(NAMED.init(PARAMS))
    moments = shardings.inner_states["default"][0]
    assert moments.mu["embed"]["table"].spec[0] == "data"
    assert moments.count.spec == jax.sharding.PartitionSpec()
    assert "head" not in {path.split("/")[0] for path in paths(moments.mu)}


@pytest.mark.parametrize("way", ["orbax", "flax", "pickle"])
def test_saved_and_restored(way, tmp_path):
    params, state = named_run()
    fresh = NAMED.init(PARAMS)
    if way == "orbax":
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / "state", state)
            saver.wait_until_finished()
            found = saver.restore(tmp_path / "state", fresh)
    elif way == "flax":
        found = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    else:
        found = pickle.loads(pickle.dumps(state))
    same(found, state)
    same(further(tree(2), found, params), further(tree(2), state, params))


# Conversion


def test_freezing_and_thawing_in_mid_run():
    """What stays in its group goes on to the bit; a group that thaws starts afresh, one that is
    frozen forgets.
    """
    thawed = by_path(
        {BIAS: {"learning_rate": 0.2}, "head/.*": {"b1": 0.5}}, aj.adamw(0.1, storage="bfloat16")
    )
    _, state = named_run()
    found = aj.convert_state(state, NAMED, thawed, PARAMS)
    same(found.state.inner_states[BIAS][0].mu, state.inner_states[BIAS][0].mu)
    assert (
        found.state.inner_states["head/.*"][0].count
        == found.state.inner_states["default"][0].count
        == 3
    )
    assert [entry.place for entry in found.fresh] == [
        f".inner_states['head/.*'][0].{m}" for m in ("mu", "nu")
    ]
    assert "float32 → bfloat16" in str(found)
    assert found.dropped == ()
    back = aj.convert_state(found.state, thawed, NAMED, PARAMS)
    assert {entry.place for entry in back.dropped} == {
        f".inner_states['head/.*'][0].{m}" for m in ("mu", "nu")
    }
    assert aj.convert_state(state, NAMED, NAMED, PARAMS).fresh == ()


SHAPES_ALIKE = {"a": (3,), "b": (3,), "c": (2, 2)}
ALIKE = tree(0, SHAPES_ALIKE)
MEMBERS = [
    "adam",
    "nadam",
    "radam",
    "amsgrad",
    "adopt",
    "adabelief",
    "yogi",
    "adamax",
    "ademamix",
    "momentum",
    "rmsprop",
]
SPLITS = {"whole": (), "a": ("a",), "b": ("b",), "ab": ("a|b",), "each": ("a", "b")}


def remembered(state):
    """All of a state but the records of what the last step used, which a new group
    does not have.
    """
    located = jax.tree_util.tree_leaves_with_path(state)
    return {
        keys: x for path, x in located if ".hyperparams" not in (keys := jax.tree_util.keystr(path))
    }


def split(tx, patterns):
    return by_path({pattern: {} for pattern in patterns}, tx) if patterns else tx


@pytest.mark.parametrize("member", MEMBERS)
def test_leaves_that_change_groups_go_on_as_if_they_had_been_there_from_the_start(member):
    tx = getattr(aj, member)(0.1)
    runs = {
        name: run(split(tx, patterns), ALIKE, tree(1, SHAPES_ALIKE))[1]
        for name, patterns in SPLITS.items()
    }
    for old, new in itertools.permutations(SPLITS, 2):
        before, after = split(tx, SPLITS[old]), split(tx, SPLITS[new])
        found = aj.convert_state(runs[old], before, after, ALIKE)
        same(remembered(found.state), remembered(runs[new]))
        assert found.fresh == found.dropped == ()


@pytest.mark.parametrize("jit", [False, True])
def test_leaves_of_other_decays_come_together(jit):
    """Of gradients that are always the same, the mean is that one and the step the learning rate,
    however long ago each began.
    """
    params, grads = jax.tree.map(jnp.zeros_like, ALIKE), jax.tree.map(jnp.sign, ALIKE)
    before = by_path(
        {"a": {"b1": 0.5, "b2": 0.9}, "b": aj.momentum(0.1, 0.9, dampened=True)},
        aj.adam(0.1, eps=0.0),
    )
    after = aj.adam(0.1, eps=0.0)
    _, state = run(before, params, grads, steps=1)
    convert = lambda state: aj.convert_state(state, before, after, params).state
    state = (jax.jit(convert) if jit else convert)(state)
    assert state[0].weights.shape == (2, 2, 3)
    for _ in range(3):
        updates, state = after.update(grads, state, params)
        jax.tree.map(
            lambda u, g: np.testing.assert_allclose(u, -0.1 * g, rtol=1e-5), updates, grads
        )


def test_layers_thaw_one_after_the_other():
    """Those that have moved go on to the bit; one that thaws steps as in a new run."""
    grads, new = tree(1, SHAPES_ALIKE), aj.adam(0.1)
    before, then = by_path({"a|b": "frozen"}, new), by_path({"a": "frozen"}, new)
    _, state = run(before, ALIKE, grads)
    found = aj.convert_state(state, before, then, ALIKE)
    fresh = {entry.place: entry.note for entry in found.fresh}
    assert fresh == {
        ".inner_states['default'][0].mu": "of b",
        ".inner_states['default'][0].nu": "of b",
    }
    updates, after = then.update(grads, found.state, ALIKE)
    same(updates["c"], before.update(grads, state, ALIKE)[0]["c"])
    np.testing.assert_allclose(
        updates["b"], new.update(grads, new.init(ALIKE), ALIKE)[0]["b"], rtol=1e-6
    )
    assert (updates["a"] == 0).all()

    found = aj.convert_state(after, then, new, ALIKE)
    again, _ = new.update(grads, found.state, ALIKE)
    expected, _ = then.update(grads, after, ALIKE)
    same({"b": again["b"], "c": again["c"]}, {"b": expected["b"], "c": expected["c"]})

    back = aj.convert_state(after, then, before, ALIKE)
    assert {(entry.place, entry.note) for entry in back.dropped} == {
        (".inner_states['default'][0].mu", "of b"),
        (".inner_states['default'][0].nu", "of b"),
    }


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("a/*", "a/.*"),
        ("*/bias", ".*/bias"),
        ("head/.*", "params/head/.*"),
        ("head", ".*/head/.*"),
        ("kernel", ".*/kernel"),
    ],
)
def test_what_may_have_been_meant_by_a_pattern(pattern, meant):
    """B10, D3: "a/*" was answered by ".*(a/*).*", which freezes all that has an "a" in it."""
    tree = {
        "params": {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
    }
    tree = tree["params"] if pattern == "a/*" else tree
    if pattern == "*/bias":
        with pytest.raises(ValueError, match="expected a regular expression"):
            by_path({pattern: "frozen"}, aj.adam(0.1))
        return
    with pytest.raises(ValueError, match=f"did you mean {re.escape(repr(meant))}"):
        by_path({pattern: "frozen"}, aj.adam(0.1)).init(tree)
