"""Optimizers take the same steps on any mesh, bit for bit.

The oracle is the same run on one device. One process with eight devices that are this machine's CPU
runs all layouts and prints which arrays differ: this file, as a script.
"""

import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import apply, mesh_on, raw
from helpers import on_eight_devices
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adam_jax as aj

MEMBERS = aj.family.__all__
STORAGES = ("float32", "bfloat16", "8bit")
SOME = ("adam", "lamb", "adam_mini", "ademamix", "adopt")
LAYOUTS = {
    "2 devices, data": (("data", 2, None), "data"),
    "4 devices, model": (("model", 4, None), None),
    "4 devices, both": (("data", 2, "model"), "data"),
    "8 devices, both": (("data", 4, "model"), "data"),
    "8 devices, data": (("data", 8, None), "data"),
}


def same_on_any_mesh(found, members):
    """Whether each member met three of the five layouts, in another storage each time, and was the
    same bit for bit.
    """
    for turn, layout in enumerate(LAYOUTS):
        expected = {
            name: [] for i, name in enumerate(members) if (i + turn) % len(LAYOUTS) < len(STORAGES)
        }
        assert found[layout] == expected
        assert expected


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(__file__)


def test_members_take_the_same_steps_on_any_mesh(found):
    """Fed the same gradients, parameters and state are those of one device, also of members that
    need whole leaves.
    """
    same_on_any_mesh(found, SOME)


@pytest.mark.slow
def test_every_member_takes_the_same_steps_on_any_mesh():
    same_on_any_mesh(on_eight_devices(__file__, "every member"), MEMBERS)


def same_steps(members):
    """Which arrays differ from those of one device after some steps, by layout and member: all
    members in one program.
    """
    draw = np.random.default_rng(0)
    shapes = {"w": (8, 16, 40), "b": (40,)}
    start = {
        name: {k: draw.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
        for name in members
    }
    scale = lambda: 10.0 ** draw.integers(-3, 2)
    course = [
        jax.tree.map(lambda x: (draw.standard_normal(x.shape) * scale()).astype(np.float32), start)
        for _ in range(4)
    ]

    def run(txs, place, states):
        params = place({name: start[name] for name in txs})
        state = {name: tx.init(start[name]) for name, tx in txs.items()}
        state = state if states is None else jax.device_put(state, states)

        def step(params, state, gradients):
            made = {
                name: tx.update(gradients[name], state[name], params[name])
                for name, tx in txs.items()
            }
            return {k: apply(params[k], u) for k, (u, _) in made.items()}, {
                k: s for k, (_, s) in made.items()
            }

        placed = None if states is None else (jax.tree.map(lambda x: x.sharding, params), states)
        advance = jax.jit(step, out_shardings=placed)
        for gradients in course:
            params, state = advance(params, state, place({name: gradients[name] for name in txs}))
        return {name: raw((params[name], state[name])) for name in txs}

    made = {
        storage: {name: getattr(aj, name)(1e-2, storage=storage) for name in members}
        for storage in STORAGES
    }
    alone = {
        storage: run(txs, lambda tree: jax.tree.map(jnp.asarray, tree), None)
        for storage, txs in made.items()
    }
    found = {}
    for turn, (layout, ((first, count, second), zero)) in enumerate(LAYOUTS.items()):
        turns = {name: (i + turn) % len(LAYOUTS) for i, name in enumerate(members)}
        storage_of = {name: STORAGES[its] for name, its in turns.items() if its < len(STORAGES)}
        txs = {name: made[storage][name] for name, storage in storage_of.items()}
        names = (first, second) if second else (first,)
        mesh = mesh_on((count, 2) if second else (count,), names)
        model = "model" if "model" in names else None
        shardings = {
            name: {"w": NamedSharding(mesh, P(None, model)), "b": NamedSharding(mesh, P())}
            for name in txs
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            states = {
                name: aj.state_shardings(tx, start[name], shardings[name], zero=zero)
                for name, tx in txs.items()
            }
        cut = run(txs, lambda tree, to=shardings: jax.device_put(tree, to), states)
        expected = {name: alone[storage][name] for name, storage in storage_of.items()}
        found[layout] = {
            name: [path for path, bits in its.items() if cut[name][path] != bits]
            for name, its in expected.items()
        }
    return found


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    sys.stdout.write(json.dumps(same_steps(MEMBERS if sys.argv[1:] else SOME)) + "\n")
