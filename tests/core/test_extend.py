"""A stage with a moment of its own and a wrapper, as a stranger writes them, and all that the
package does with them.

What is between the two marks is what CONTRIBUTING shows.
"""

import functools
import inspect
import pickle
import re
import sys

# A stage and a wrapper
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normals, same

import adam_jax as aj
from adam_jax import extend


class MeanSizeState(NamedTuple):
    count: Any
    size: Any
    hyperparams: Any
    scales: Any


@extend.stage(takes="updates", gives="updates", rate="before")
def scale_by_mean_size(decay=0.9, *, storage="float32"):
    """Divides each element by the mean of its absolute values."""
    hypers = extend.Hyperparameters(extend.Hyperparameter("decay", decay, "[0, 1)"))
    _, form = extend.resolve_storage(storage)
    slot = extend.MomentSlot(
        "size", form, signed=False, start=1.0, meaning="the mean size of {}", decay="decay"
    )

    def init(params):
        size = slot.init(params)
        return MeanSizeState(jnp.int32(0), size, hypers.kept(jnp.float32), slot.first_scales(size))

    def update(updates, state, params, context):
        rate = 1 - hypers["decay"].at(state.count, state.hyperparams)

        def leaf(update, size):
            size = size + rate * (abs(extend.as_wide(update)) - size)
            return extend.as_wide(update) / size, size

        updates, size = extend.lift(
            leaf, updates, outputs=2, size=slot.widen(state.size, state.scales)
        )
        count = extend.increment(state.count)
        bits = extend.StepBits(context.stream("mean_size"), count)
        stored = slot.narrow(size, state.size, state.scales, bits, context.selector)
        return updates, MeanSizeState(count, stored[0], state.hyperparams, stored[1])

    return extend.Definition(init, update, (slot,), hypers, counter="count")


class CountedState(NamedTuple):
    inner_state: Any
    steps: Any


@extend.wrapper
def counted(tx):
    def update(updates, state, params, context):
        updates, inner = extend.call_update(tx, updates, state.inner_state, params, context)
        return updates, CountedState(inner, state.steps + 1)

    return lambda params: CountedState(tx.init(params), jnp.int32(0)), update


# The end of the stage and the wrapper

PARAMS = {"body": normals(64, 128), "head": normals(3, seed=1)}
GRADS = jax.tree.map(lambda x: x + 2, PARAMS)


def own(rate=0.1, **options):
    return counted(aj.chain(scale_by_mean_size(**options), aj.scale_by_learning_rate(rate)))


def after(tx, steps=3):
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = step(GRADS, state, PARAMS)
    return updates, state


@functools.cache
def stored():
    return after(own(storage="8bit"))


def test_it_is_short():
    """Without blank lines."""
    text = inspect.getsource(sys.modules[__name__])
    lines = re.search(r"# A stage and a wrapper\n(.*?)# The end of the stage", text, re.DOTALL)[
        1
    ].splitlines()
    code = [line for line in lines if line.strip()]
    assert len(code) < 50, len(code)


def test_a_step_by_hand():
    updates, state = after(own())
    size = 1 + (1 - 0.9**3) * (np.abs(GRADS["head"]) - 1)
    np.testing.assert_allclose(updates["head"], -0.1 * GRADS["head"] / size, rtol=1e-6)
    assert (int(state.steps), int(state.inner_state[0].count)) == (3, 3)


def test_it_is_stored_in_8_bits():
    tx, (_, state) = own(storage="8bit"), stored()
    first = state.inner_state[0]
    assert (first.size["body"].dtype, first.size["head"].dtype) == (jnp.uint8, jnp.float32)
    there = aj.convert_state(state, tx, own(), PARAMS).state.inner_state[0].size["body"]
    exact = 1 + (1 - 0.9**3) * (np.abs(GRADS["body"]) - 1)
    assert abs(np.mean(there / exact) - 1) < 0.01  # 8192 elements with a noise of 9 %
    found = aj.state_bytes(tx, PARAMS)
    assert (found.nu, found.other) == (64 * 128 + 64 * 2 + 3 * 4, 4 + 4)
    assert [(leaf.moment, leaf.path) for leaf in found.wide] == [("size", "head")]


def test_it_is_described_observed_and_read():
    tx, (_, state) = own(storage="8bit"), stored()
    body, head = aj.describe(tx, PARAMS).leaves
    assert (body.state, head.state) == ({"size": "uint8"}, {"size": "float32"})
    assert body.stages == ("counted", "scale_by_mean_size", "scale_by_learning_rate")
    assert aj.hyperparameters(state, tx) == {
        "decay": jnp.float32(0.9),
        "learning_rate": jnp.float32(0.1),
    }
    seen = aj.observations(after(aj.observe(tx, every=1))[1])
    assert 0 <= seen["all/saturated_fraction"] < 1
    assert seen["all/update_rms"] > 0


def test_it_is_reset_converted_and_set():
    tx, (_, state) = own(storage="8bit"), stored()
    fresh = aj.reset(state, tx, match="head").inner_state[0]
    np.testing.assert_array_equal(fresh.size["head"], np.ones(3))
    np.testing.assert_array_equal(fresh.size["body"], state.inner_state[0].size["body"])
    moved = aj.convert_state(state, tx, aj.chain(aj.stages.cautious(), own(storage="8bit")), PARAMS)
    assert [entry.what for entry in moved.kept] == [
        "steps of counted",
        "the mean size of gradients",
    ]
    assert moved.fresh == moved.dropped == ()
    changing = own(decay=aj.settable(0.9))
    state = aj.set_hyperparameters(changing.init(PARAMS), changing, decay=0.5)
    assert state.inner_state[0].hyperparams["decay"] == 0.5
    with pytest.raises(ValueError, match="got the state of another transformation"):
        changing.update(GRADS, aj.adam(0.1).init(PARAMS), PARAMS)


def test_it_is_sharded_and_grouped():
    tx = own(storage="8bit")
    mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.warns(UserWarning, match="size.'head'"):
        places = aj.state_shardings(
            tx, PARAMS, jax.sharding.PartitionSpec(), mesh=mesh, zero="data"
        ).inner_state[0]
    assert (
        places.size["body"].spec
        == places.scales["size_scale"]["body"].spec
        == jax.sharding.PartitionSpec("data", None)
    )
    grouped = aj.by_path({"head": aj.adam(0.1)}, tx)
    assert aj.hyperparameters(grouped.init(PARAMS), grouped)["default/decay"] == jnp.float32(0.9)
    guarded = aj.skip_nonfinite(tx)
    skipped = guarded.update(
        jax.tree.map(lambda x: x * np.nan, GRADS), guarded.init(PARAMS), PARAMS
    )[1]
    same(skipped.inner_state, tx.init(PARAMS))


def test_it_is_a_value_and_is_saved(tmp_path):
    import orbax.checkpoint as ocp

    tx, (_, state) = own(storage="8bit"), stored()
    assert repr(tx).startswith(
        "counted(tx=chain(scale_by_mean_size(decay=0.9, storage='8bit'), scale_by_learning_rate"
    )
    assert pickle.loads(pickle.dumps(tx)) == tx == own(storage="8bit") != own()
    same(pickle.loads(pickle.dumps(state)), state)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        same(saver.restore(tmp_path / "state", tx.init(PARAMS)), state)
    assert isinstance(optax.tree.get(state, "size"), dict)


def test_a_learning_rate_that_is_not_declared():
    """A stage may apply a rate of its own, and say nothing else about itself."""

    @extend.stage(takes="updates", gives="updates", rate="applies")
    def downhill(rate=0.5):
        return extend.stateless, lambda updates, state, params, context: (
            jax.tree.map(lambda u: -rate * u, updates),
            state,
        )

    tx = aj.chain(aj.track_moments(), aj.correct_bias(), aj.scale_by_moments(), downhill())
    np.testing.assert_allclose(
        tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]["head"], -0.5, rtol=1e-6
    )
    observed = aj.observe(tx, every=1)
    assert (
        aj.observations(observed.update(GRADS, observed.init(PARAMS), PARAMS)[1])["all/update_rms"]
        > 0
    )
    behind = aj.chain(tx, aj.stages.clip_update_rms())
    with pytest.raises(ValueError, match="does not know the one learning rate"):
        behind.update(GRADS, behind.init(PARAMS), PARAMS)
