"""Patterns name the same leaves in every kind of tree: Flax, Equinox, dicts, lists.

The oracle is how far each leaf moves: in a step of Adam, by the learning rate of its group.
"""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from grouped import BIAS, PARAMS, named, run, tree
from helpers import bits, same

import adam_jax as aj
from adam_jax import by_path
from adam_jax._core.paths import path_of, paths

x, y = jax.random.normal(jax.random.key(0), (8, 2)), jnp.arange(8.0)[:, None]
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
