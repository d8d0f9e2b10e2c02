"""A group of `by_path` moves as its own transformation does alone on the leaves of the group.

The oracles are that transformation on the sub-tree, and `optax.partition`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grouped import BIAS, DEFAULT, PARAMS, halved, named, only, run, tree
from helpers import bits, same

import adam_jax as aj
from adam_jax import by_path

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
