"""Members of a population, one per device, are runs of their own; devices of one run agree.

One process with eight devices that are this machine's CPU runs all cases and prints what it found:
this file, as a script. What is right is each member's run by itself, on one device.
"""

import json
import sys

import jax
import pytest
from helpers import QUICK_FLAGS, on_eight_devices

import adam_jax as aj

WAYS = ("vmap", "pmap", "shard_map", "shard_map, unchecked", "shard_map, init inside")
SILENT = (
    "pmap",
    "pmap without a name",
    "shard_map, unchecked",
    "shard_map, init inside",
    "codes",
    "observe",
)


pytestmark = pytest.mark.skipif(
    not hasattr(jax, "shard_map"), reason="JAX 0.6 has jax.shard_map elsewhere, without types"
)


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(__file__, flags=QUICK_FLAGS)


@pytest.mark.parametrize("way", WAYS)
def test_members_are_runs_of_their_own(found, way):
    """A4: one member's NaN skips a step of that member, one member's spike widens its own scales.

    To the bit, parameters and the whole state.
    """
    assert found[way]["skipped"] == [0, 0, 0, 2, 0, 0, 1, 0]
    assert found[way]["differ"] == []


@pytest.mark.parametrize("case", SILENT)
def test_what_jax_cannot_tell_is_refused(found, case):
    """A4: no argument says which devices are one run, and gradients may differ."""
    error = found["refused"][case]
    assert "manual_axes(tx, shared=" in error
    assert "manual_axes(tx, independent=" in error
    assert len(error) <= 600


def test_where_jax_knows_nothing_has_to_be_said(found):
    """A4: gradients that are the same on all devices, or a state of each device's own."""
    assert found["known"] == {"averaged": [0] * 8, "own states": [0, 0, 0, 1, 0, 0, 0, 0]}


def test_one_run_agrees_however_it_is_mapped(found):
    """A4: along a shared axis one device's NaN skips the step of all."""
    assert found["shared"] == {"pmap": [1] * 8, "shard_map, unchecked": [1] * 8}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shared": 1}, TypeError, "shared: found 1; expected the name of a mesh axis"),
        ({"shared": "a", "independent": ("a", "b")}, ValueError, "found 'a' in both"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        aj.manual_axes(aj.adam(1e-3), **arguments)


def test_a_run_under_way_takes_its_state_along():
    import jax.numpy as jnp

    params = {"w": jnp.ones(4)}
    tx = aj.skip_nonfinite(aj.adam(1e-3))
    around = aj.manual_axes(tx, independent="population")
    _, state = tx.update(params, tx.init(params), params)
    moved = aj.convert_state(state, tx, around, params).state
    assert int(moved.inner_state.inner_state[0].count) == 1
    assert "learning_rate" in aj.hyperparameters(moved, around)


# In a process with eight devices


def main():
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((8,), ("members",), axis_types=(AxisType.Auto,))
    steps = 6
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((8, steps, 8, 640)).astype(np.float32)
    gradients[3, 2:4, 1, 1] = np.nan
    gradients[5] *= 1e4
    gradients[6, -1] *= 1e6
    gradients = jnp.asarray(gradients)
    start = jnp.asarray(rng.standard_normal((8, 8, 640)), jnp.float32)

    guarded = aj.observe(aj.skip_spikes(aj.adamw(1e-2, storage="8bit"), window=4, warmup=3))
    tx = aj.manual_axes(guarded, independent="members")
    members = P("members")

    def step(tx):
        def step(carry, gradient):
            updates, state = tx.update(gradient, carry[1], carry[0])
            return (aj.apply_updates(carry[0], updates), state), None

        return step

    def run(params, gradients, state, tx=tx):
        return jax.lax.scan(step(tx), (params, state), gradients)[0]

    def run_inside(params, gradients):
        return run(params, gradients, tx.init(params))

    def of_one(function):
        """A function of a member as one of a device's part, which has a leading axis of 1."""
        return lambda *trees: jax.tree.map(
            lambda x: x[None], function(*jax.tree.map(lambda x: x[0], trees))
        )

    def mapped(function, **more):
        return jax.jit(
            jax.shard_map(of_one(function), mesh=mesh, in_specs=members, out_specs=members, **more)
        )

    states = jax.vmap(tx.init)(start)
    ways = {
        "vmap": lambda: jax.jit(jax.vmap(run))(start, gradients, states),
        "pmap": lambda: jax.pmap(run, axis_name="members")(start, gradients, states),
        "shard_map": lambda: mapped(run)(start, gradients, states),
        "shard_map, unchecked": lambda: mapped(run, check_vma=False)(start, gradients, states),
        "shard_map, init inside": lambda: mapped(run_inside)(start, gradients),
    }
    alone = jax.jit(run)
    expected = [alone(start[i], gradients[i], tx.init(start[i])) for i in range(8)]

    def differ(made):
        return [
            f"{jax.tree_util.keystr(path)} of {i}"
            for path, x in jax.tree_util.tree_leaves_with_path(made)
            for i in range(8)
            if "observed" not in jax.tree_util.keystr(path)
            and np.asarray(x[i]).tobytes()
            != np.asarray(dict(jax.tree_util.tree_leaves_with_path(expected[i]))[path]).tobytes()
        ]

    def skips(state):
        return np.asarray(state.skipped).tolist()

    found = {}
    for way, call in ways.items():
        made = call()
        found[way] = {
            "skipped": skips(made[1].inner_state.inner_state),
            "differ": differ(made),
        }

    def error(call):
        try:
            jax.eval_shape(call)
        except ValueError as error:
            return str(error)
        return ""

    def once(tx):
        def one(params, gradient):
            return tx.update(gradient, tx.init(params), params)[1]

        return one

    guard = aj.skip_nonfinite(aj.adam(1e-3))
    first = gradients[:, 2]
    unchecked = {"check_vma": False}
    found["refused"] = {
        "pmap": error(lambda: jax.pmap(once(guard), axis_name="members")(start, first)),
        "pmap without a name": error(lambda: jax.pmap(once(guard))(start, first)),
        "shard_map, unchecked": error(lambda: mapped(once(guard), **unchecked)(start, first)),
        "shard_map, init inside": error(lambda: mapped(once(guard))(start, first)),
        "codes": error(
            lambda: mapped(once(aj.adam(1e-3, storage="8bit")), **unchecked)(start, first)
        ),
        "observe": error(
            lambda: mapped(once(aj.observe(aj.adam(1e-3))), **unchecked)(start, first)
        ),
    }

    def averaged(params, gradient):
        gradient = jax.lax.pmean(jnp.nan_to_num(gradient), "members")
        # Its type says that it is the same on all devices, which `out_specs` does not want.
        return once(guard)(params, gradient).skipped + 0 * jax.lax.axis_index("members")

    own = jax.vmap(guard.init)(start)
    found["known"] = {
        "averaged": np.asarray(mapped(averaged)(start, first)).tolist(),
        "own states": skips(mapped(lambda p, g, s: guard.update(g, s, p)[1])(start, first, own)),
    }
    shared = aj.manual_axes(guard, shared="members")
    found["shared"] = {
        "pmap": skips(jax.pmap(once(shared), axis_name="members")(start, first).inner_state),
        "shard_map, unchecked": skips(mapped(once(shared), **unchecked)(start, first).inner_state),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
