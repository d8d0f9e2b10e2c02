"""With ZeRO a device holds its share of the state, and a step exchanges gradients and parameters
once.

The oracle is the number of elements of the parameters. One process with eight devices that are this
machine's CPU compiles and runs the steps: this file, as a script.
"""

import json
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from eight_devices import apply, mesh_on
from helpers import moves, on_eight_devices
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adam_jax as aj


class Step(NamedTuple):
    """A training step.

    Attributes:
      mode: of the mesh's axis.
      storage: of the moments.
      link: behind Adam, with bfloat16 parameters.
      guarded: whether a guard is around.
    """

    mode: str
    storage: str
    link: str | None = None
    guarded: bool = False


STEPS = {
    "auto": Step("Auto", "float32"),
    "explicit": Step("Explicit", "float32"),
    "8bit": Step("Auto", "8bit"),
    "8bit, explicit, rounded": Step("Explicit", "8bit", "round_stochastically"),
    "bfloat16, compensated": Step("Auto", "bfloat16", "compensate"),
    "guarded": Step("Auto", "float32", guarded=True),
}


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(__file__)


@pytest.mark.parametrize("name", STEPS)
def test_a_device_holds_its_share_of_the_state(found, name):
    total, scalars, per_device = found[name]["bytes"]
    assert per_device == [(total - scalars) / 8 + scalars] * 8
    assert scalars < 0.01 * total


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_summed_once_and_parameters_gathered_once(found, name):
    """All else that travels is a scalar: whether all gradients are finite.

    Rows, and so their scales, are on one device each.
    """
    moved, elements = found[name]["moved"], found[name]["elements"]
    large = {
        kind: sorted(size for what, size in moved if what == kind and size > 16)
        for kind in ("all-reduce", "all-gather")
    }
    assert sum(large["all-reduce"]) == sum(large["all-gather"]) == elements
    small = [kind for kind, size in moved if size <= 16]
    assert set(small) <= {"all-reduce"}
    assert bool(small) == STEPS[name].guarded
    assert {kind for kind, _ in moved} == {"all-reduce", "all-gather"}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_leaves_everything_in_its_place(found, name):
    assert found[name]["away"] == []


def train(how):
    """What a data-parallel training step with ZeRO exchanges, and what each device then holds."""
    mesh = mesh_on((8,), ("data",), how.mode)
    dtype = jnp.bfloat16 if how.link else jnp.float32
    tx = aj.adamw(1e-2, storage=how.storage)
    tx = aj.chain(tx, getattr(aj, how.link)()) if how.link else tx
    tx = aj.skip_nonfinite(tx) if how.guarded else tx
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params = {
        "w1": jnp.ones((64, 256), dtype),
        "b1": jnp.ones((256,), dtype),
        "w2": jnp.ones((256, 128), dtype),
    }
    params = jax.device_put(params, everywhere)
    images = jax.device_put(
        jnp.linspace(-1, 1, 32 * 64, dtype=jnp.float32).reshape(32, 64).astype(dtype), split
    )
    shardings = aj.state_shardings(tx, params, everywhere, zero="data")
    context = jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)

    def step(params, state, images):
        def loss(params):
            hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
            return jnp.mean(jnp.square(hidden @ params["w2"]).astype(jnp.float32))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return apply(params, updates), state

    with context:
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        placed = (jax.tree.map(lambda _: everywhere, params), shardings)
        compiled = (
            jax.jit(step, out_shardings=placed, donate_argnums=(0, 1))
            .lower(params, state, images)
            .compile()
        )
        params, state = compiled(params, state, images)
    leaves = jax.tree.leaves(state)
    per_device = [
        sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == d)
        for d in jax.devices()
    ]
    after = jax.tree_util.tree_leaves_with_path((params, state))
    return {
        "moved": moves(compiled.as_text()),
        "elements": sum(p.size for p in jax.tree.leaves(params)),
        "bytes": [
            sum(leaf.nbytes for leaf in leaves),
            sum(leaf.nbytes for leaf in leaves if leaf.size < 64),
            per_device,
        ],
        "away": [
            jax.tree_util.keystr(path)
            for (path, leaf), where in zip(after, jax.tree.leaves(placed), strict=True)
            if not leaf.sharding.is_equivalent_to(where, leaf.ndim)
        ],
    }


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    sys.stdout.write(json.dumps({name: train(step) for name, step in STEPS.items()}) + "\n")
