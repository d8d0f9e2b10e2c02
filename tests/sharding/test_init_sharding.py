"""`init` of sharded parameters makes a state that is sharded as they are, before any step.

One process with eight devices that are this machine's CPU runs all cases and prints what it found:
this file, as a script. What is right, `state_shardings` says, which looks at shapes and paths only.
"""

import json
import sys

import jax
import pytest
from helpers import QUICK_FLAGS, on_eight_devices

CASES = (
    "guarded, in 8 bits",
    "adam_mini in 8 bits, compensated",
    "rounded, averaged",
    "observed",
)
RUNS = (
    *(f"{case} / Explicit" for case in CASES),
    *(f"{case} / Auto" for case in CASES[:3]),
    f"{CASES[0]} / Explicit, mesh set",
)


pytestmark = pytest.mark.skipif(
    not hasattr(jax, "shard_map"), reason="JAX 0.6 has jax.shard_map elsewhere, without types"
)


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(__file__, flags=QUICK_FLAGS)


@pytest.mark.parametrize("how", ["eager", "jitted", "shapes"])
@pytest.mark.parametrize("run", RUNS)
def test_a_fresh_state_is_where_its_parameters_are(found, run, how):
    """B1: moments, their scales, blocks, lost bits and averages; all else is on every device."""
    assert found[run][how] == []


@pytest.mark.parametrize("run", RUNS)
def test_a_fresh_state_has_the_types_that_a_step_gives(found, run):
    """B1: `scan`, `cond` and `optax.MultiSteps` take it, and a step compiles once."""
    assert found[run]["types"] == []
    assert found[run]["compiled"] == 1


def test_inside_shard_map_a_fresh_state_varies_as_its_parameters_do(found):
    """B1: along manual axes types are those of a step, too."""
    assert found["shard_map"] == []


# In a process with eight devices


def main():
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import adam_jax as aj
    from adam_jax.stages import average_parameters

    made = [
        aj.skip_spikes(aj.by_path({"w": {"storage": "8bit"}}, default=aj.adamw(1e-3))),
        aj.chain(aj.adam_mini(1e-3, storage="8bit"), aj.compensate()),
        aj.chain(aj.adam(1e-3), aj.round_stochastically(), average_parameters(0.9)),
        aj.observe(aj.adam(1e-3, storage="bfloat16")),
    ]
    txs = dict(zip(CASES, made, strict=True))

    def spec(sharding):
        entries = list(sharding.spec) if isinstance(sharding, NamedSharding) else [str(sharding)]
        while entries and entries[-1] is None:
            entries.pop()
        return tuple(entries)

    def elsewhere(state, expected):
        """The paths of arrays whose sharding is not the expected one."""
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True
        )
        return [
            f"{jax.tree_util.keystr(path)} {spec(x.sharding)} {spec(its)}"
            for (path, x), its in pairs
            if spec(x.sharding) != spec(its) or not x.committed
        ]

    def failures(**calls):
        for name, call in calls.items():
            try:
                jax.eval_shape(call)
            except Exception as error:
                yield f"{name}: {str(error)[:300]}"

    def look(tx, mesh):
        def put(x, *axes):
            return jax.device_put(x, NamedSharding(mesh, P(*axes)))

        params = {
            "w": put(jnp.ones((32, 256), jnp.bfloat16), "data", "model"),
            "b": put(jnp.ones(64), "model"),
        }
        shapes = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
        )
        expected = aj.state_shardings(tx, params, None)
        state = tx.init(params)
        several = optax.MultiSteps(tx, 2)
        accumulating = several.init(params)

        @jax.jit
        def step(carry, _):
            updates, state = tx.update(carry[0], carry[1], carry[0])
            return (aj.apply_updates(carry[0], updates), state), None

        # Twice: the state that a step returns is placed as the fresh one is.
        carry, _ = step((params, state), None)
        step(carry, None)
        return {
            "eager": elsewhere(state, expected),
            "jitted": elsewhere(jax.jit(tx.init)(params), expected),
            "shapes": elsewhere(tx.init(shapes), expected),
            "compiled": step._cache_size(),
            "types": list(
                failures(
                    scan=lambda: jax.lax.scan(step, (params, state), None, 3),
                    closed_over=lambda: jax.lax.scan(step, (params, tx.init(params)), None, 3),
                    scan_inside=lambda: jax.jit(
                        lambda p: jax.lax.scan(step, (p, tx.init(p)), None, 3)
                    )(params),
                    cond=lambda: jax.lax.cond(
                        params["b"].sum() > 0, lambda c: step(c, None)[0], lambda c: c, carry
                    ),
                    several=lambda: several.update(params, accumulating, params),
                )
            ),
        }

    found = {}
    for run in RUNS:
        case, mode = run.split(" / ")
        kind = getattr(AxisType, mode.split(",")[0])
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
        if "set" in mode:  # from here on, so these runs are the last
            jax.set_mesh(mesh)
        found[run] = look(txs[case], mesh)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @jax.shard_map(mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    def run(params):
        tx = aj.chain(aj.adam_mini(1e-3), average_parameters(0.9))

        def step(carry, _):
            updates, state = tx.update(carry[0], carry[1], carry[0])
            return (aj.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, 3)[0][0]

    jax.set_mesh(mesh)
    found["shard_map"] = list(failures(run=lambda: run(jnp.ones((64, 8)))))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
