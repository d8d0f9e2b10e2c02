"""A stage with a moment of its own, a wrapper and a storage format, as a stranger writes them, and
all that the package does with them.

What is between the marks is what CONTRIBUTING shows.
"""

import dataclasses
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
from jax import lax

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


@dataclasses.dataclass(frozen=True)
class HighBits(extend.Format):
    """The upper 16 bits of float32, after the sign where there is none."""

    def dtype_of(self, signed):
        return jnp.dtype(jnp.int16 if signed else jnp.uint16)

    def store(self, x, scale, random, signed):
        dropped, most = 16 if signed else 15, 2.0**127
        bits = lax.bitcast_convert_type(jnp.clip(x.astype(jnp.float32), -most, most), jnp.uint32)
        carried = bits + (random >> jnp.uint32(32 - dropped))  # goes up as often as is unbiased
        kept = (carried >> jnp.uint32(dropped)).astype(jnp.uint16)
        return lax.bitcast_convert_type(kept, self.dtype_of(signed))

    def read(self, stored, scale, signed):
        bits = lax.bitcast_convert_type(stored, jnp.uint16).astype(jnp.uint32)
        return lax.bitcast_convert_type(bits << jnp.uint32(16 if signed else 15), jnp.float32)


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


def test_a_format_of_ones_own(tmp_path):
    """Against float32: unbiased to one step in 2⁸ of a number, 2⁹ for ν, for each of 8192 elements;
    and what the package does with a moment, it does with this one.
    """
    exact, tx = aj.adamw(1e-3), aj.adamw(1e-3, storage=HighBits())
    state, wide = after(tx)[1], after(exact)[1]
    assert (state[0].mu["body"].dtype, state[0].nu["body"].dtype) == (jnp.int16, jnp.uint16)
    converted = aj.convert_state(state, tx, exact, PARAMS)
    assert converted.fresh == converted.dropped == ()
    for field, bits in ("mu", 7), ("nu", 8):
        found, true = (getattr(s[0], field)["body"] for s in (converted.state, wide))
        off = np.asarray(found / true - 1) * 2.0**bits
        assert np.abs(off).max() < 2
        assert np.abs(off).max() > 0.5
        assert abs(off.mean()) < 5 * off.std() / np.sqrt(off.size)
    back = aj.convert_state(wide, exact, tx, PARAMS).state[0]
    np.testing.assert_allclose(
        HighBits().read(back.nu["body"], None, False), wide[0].nu["body"], rtol=2**-9
    )
    bfloat16 = aj.adamw(1e-3, storage="bfloat16")
    assert "int16 → bfloat16" in str(aj.convert_state(state, tx, bfloat16, PARAMS))
    assert aj.state_bytes(tx, PARAMS).nu == 2 * 64 * 128 + 4 * 3
    assert not aj.reset(state, tx)[0].nu["body"].any()
    mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.PartitionSpec()
    shardings = aj.state_shardings(tx, PARAMS, whole, mesh=mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    assert "storage=HighBits(" in repr(tx)
    assert pickle.loads(pickle.dumps(tx)) == tx != exact
    grouped = aj.by_path({"head": aj.adam(0.1)}, default=tx)
    seen = aj.observations(after(aj.observe(grouped, every=1))[1])
    assert seen["all/saturated_fraction"] == 0
    with pytest.raises(ValueError, match="got the state of|rests as"):
        tx.update(GRADS, wide, PARAMS)


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
