"""Inside `jax.shard_map` a step is the same, and devices of one run agree on scales and skipped
steps.

The oracle is the same step outside of it, on one device. One process with eight devices that are
this machine's CPU runs both: this file, as a script.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import apply, mesh_on, raw
from helpers import on_eight_devices
from jax.sharding import PartitionSpec as P

import adam_jax as aj
from adam_jax.storage.scales import unpack


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(__file__)


def test_inside_shard_map_a_step_is_the_same(found):
    assert found["float32"] == []


def test_inside_shard_map_devices_share_scales_and_verdicts(found):
    """Along a row that is cut.

    They are those of one device within an octave: parts of an array have other random bits.
    """
    assert found["scales differ"] == []
    assert found["verdicts"] == [1] * 8
    assert found["moved by poison"] == []


KNOWN = hasattr(jax.core.ShapedArray, "vma") or hasattr(jax.core.ShapedArray, "manual_axis_type")
"""Whether JAX tells along which axes an array is cut.

Else rows on several devices share a scale, which is too large for some.
"""


def apart(found, expected):
    """How far each shard is from its part of the expected array."""
    return [np.asarray(shard.data) - expected[shard.index] for shard in found.addressable_shards]


def mapped():
    """Steps inside `jax.shard_map`, each device with its part of the parameters."""
    if hasattr(jax, "shard_map"):
        shard_map = jax.shard_map
    else:
        from jax.experimental.shard_map import shard_map
    mesh = mesh_on((8,), ("data",))
    params = {
        "w": jnp.linspace(-1, 1, 64 * 256, dtype=jnp.float32).reshape(64, 256),
        "b": jnp.ones(256, jnp.float32),
    }
    params["columns"] = (
        params["w"].T.reshape(16, 1024) * 10.0 ** jnp.arange(-8, 8, dtype=jnp.float32)[:, None]
    )
    cut = {"w": P("data"), "b": P("data"), "columns": P(None, "data")}
    gradients = jax.tree.map(lambda p: 0.3 * p + 0.1, params)
    poison = gradients | {"w": gradients["w"].at[-1, -1].set(jnp.nan)}  # on the last device alone
    results = {}
    for storage in ("float32", "8bit"):
        tx = aj.manual_axes(aj.skip_nonfinite(aj.adam(1e-2, storage=storage)), shared="data")
        shardings = aj.state_shardings(tx, params, cut, mesh=mesh)
        spec = jax.tree.map(lambda its: its.spec, shardings)

        def step(params, state, gradients, tx=tx):
            updates, state = tx.update(gradients, state, params)
            return apply(params, updates), state

        whole = jax.jit(step)
        parts = jax.jit(
            shard_map(step, mesh=mesh, in_specs=(cut, spec, cut), out_specs=(cut, spec))
        )
        one = two = (params, tx.init(params))
        for _ in range(5):
            one, two = whole(*one, gradients), parts(*two, gradients)
        before, after = raw(one), raw(two)
        results[storage] = [path for path in before if before[path] != after[path]]
        units = [
            jax.tree.map(unpack, its[1].inner_state.inner_state[0].scales) for its in (one, two)
        ]
        results["scales differ"] = [
            jax.tree_util.keystr(path)
            for (path, cut), expected in zip(
                jax.tree_util.tree_leaves_with_path(units[1]),
                jax.tree.leaves(units[0]),
                strict=True,
            )
            if not all(d.min() >= -1 and (d.max() <= 1 or not KNOWN) for d in apart(cut, expected))
            or not all(
                (np.asarray(s.data) == np.asarray(cut)[s.index]).all()
                for s in cut.addressable_shards
            )
        ]
        sick = parts(*two, poison)
        results["verdicts"] = [
            int(np.asarray(s.data)) for s in sick[1].inner_state.skipped.addressable_shards
        ]
        left, right = (
            raw((two[0], two[1].inner_state.inner_state)),
            raw((sick[0], sick[1].inner_state.inner_state)),
        )
        results["moved by poison"] = [path for path in left if left[path] != right[path]]
    return results


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    sys.stdout.write(json.dumps(mapped()) + "\n")
