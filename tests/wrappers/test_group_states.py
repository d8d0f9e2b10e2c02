"""A `by_path` transformation is a value, and its state goes where every state goes: scans, resets,
checkpoints, other groups.

The oracle is the state itself, before and after.
"""

import copy
import functools
import pickle
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from grouped import BIAS, PARAMS, adam, halved, run, tree
from helpers import avals, bits, same

import adam_jax as aj
from adam_jax import by_path
from adam_jax._core.paths import paths


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
