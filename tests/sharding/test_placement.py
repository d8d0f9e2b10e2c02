"""A step is the same bit for bit on one device and on eight, however its arrays are laid out, and
moves none of them.

One process with eight devices that are this machine's CPU runs all cases and prints what it found:
this file, as a script."""

import functools
import json
import math
import re
import sys

import pytest
from helpers import MOVES, on_eight_devices

# Leaves of several ranks, with a scale per row and one for all, narrow and wide. One is too small
# to be stored in 8 bits.
SHAPES = {"w": (128, 64), "t": (8, 16, 128), "wide": (4096,), "b": (40,)}
LAYOUTS = ("rows", "columns", "both", "replicated")
STEPS = 10
# name: (member, storage, link, whether a step needs a number from all of a leaf). Each of its
# meshes gives every leaf another layout; over all of them a leaf sees every layout.
CASES = {
    "adam in bfloat16, rounded stochastically": ("adam", "bfloat16", "round_stochastically", False),
    "adam in 8 bits, compensated": ("adam", "8bit", "compensate", True),
    "ademamix in 8 bits, rounded stochastically": (
        "ademamix",
        "8bit",
        "round_stochastically",
        True,
    ),
    "adopt in bfloat16, compensated": ("adopt", "bfloat16", "compensate", False),
}
DEVICES = dict(zip(CASES, [(2, 8), (2, 8), (4,), (4,)], strict=True))
FEW = 1000
"""Elements: more than the scales of all moments together, less than any leaf that has scales."""


@pytest.fixture(scope="module")
def found():
    """What the process with eight devices says of each run: "case / devices" -> a dictionary."""
    return on_eight_devices(__file__)


RUNS = [f"{name} / {count}" for name in CASES for count in DEVICES[name]]


@pytest.mark.parametrize("run", RUNS)
def test_parameters_state_and_updates_are_those_of_one_device(found, run):
    assert found[run]["devices"] == int(run.rsplit(" ", 1)[1])
    assert found[run]["differ"] == [], found[run]["layout"]


@pytest.mark.parametrize("run", RUNS)
def test_every_array_stays_where_its_parameter_is(found, run):
    assert found[run]["moved"] == [], found[run]["layout"]


@pytest.mark.parametrize("run", RUNS)
def test_only_scalars_and_a_number_per_row_travel(found, run):
    reduces = CASES[run.split(" / ")[0]][3]
    travels = found[run]["collectives"]
    assert all(kind == "all-reduce" and size <= FEW for kind, size in travels), travels
    assert bool(travels) == (reduces and found[run]["devices"] > 1), travels


@pytest.mark.parametrize("name", CASES)
def test_the_same_run_twice_is_the_same(found, name):
    assert found[name] == {"again": [], "moving": True}


def test_the_search_for_collectives_finds_one(found):
    """A transposition of a cut array cannot do without."""
    assert found["transposed"]
    assert all(size > FEW for _, size in found["transposed"])


# The process with eight devices


def collectives(text):
    """Kind and number of elements of all that is exchanged in a compiled program."""
    matches = map(MOVES.search, text.splitlines())
    return [
        [
            match[2],
            sum(
                math.prod(map(int, filter(None, s.split(","))))
                for s in re.findall(r"\w\[([\d,]*)\]", match[1])
            ),
        ]
        for match in matches
        if match
    ]


def main():
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import adam_jax as aj

    draw = np.random.default_rng(0)

    def tree(scale):
        wide = {"wide": np.float32}
        return {
            k: np.asarray(draw.standard_normal(s) * scale, wide.get(k, jnp.bfloat16))
            for k, s in SHAPES.items()
        }

    start = tree(1.0)
    grads = [tree(2.0 ** draw.integers(-6, 2)) for _ in range(STEPS)]

    def transformation(member, storage, link):
        return aj.chain(getattr(aj, member)(1e-2, storage=storage), getattr(aj, link)())

    def spec(layout, shape):
        if layout == "rows":
            return P(("x", "y"))
        if layout == "columns":
            return P(*[None] * (len(shape) - 1), ("x", "y"))
        if layout == "both":
            return P("x", "y") if len(shape) > 1 else P("y")
        return P()

    def placing(count, turn):
        """A function that lays out whatever has the shape of a leaf, and the layouts by leaf."""
        mesh = Mesh(np.array(jax.devices()[:count]).reshape(min(count, 2), -1), ("x", "y"))
        names = {leaf: LAYOUTS[(i + turn) % 4] for i, leaf in enumerate(SHAPES)}
        specs = {shape: spec(names[leaf], shape) for leaf, shape in SHAPES.items()}
        rows = SHAPES["t"][:-1]
        specs[*rows, 1] = P(*specs[SHAPES["t"]][: len(rows)])  # its scales
        return lambda x: NamedSharding(mesh, specs.get(x.shape, P())), names

    def place(x, where):
        return jnp.array(x) if where is None else jax.device_put(x, where(x))

    def run(tx, where):
        """Bytes of parameters, state and updates after every step, of two runs; the compiled step;
        what has left its place.
        """
        put = functools.partial(jax.tree.map, functools.partial(place, where=where))
        first = put((start, jax.jit(tx.init)(start)))

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, updates

        compiled = jax.jit(step).lower(*first, put(grads[0])).compile()
        logs, moved = ([], []), set()
        for log in logs:
            params, state = first
            for g in grads:
                after = jax.tree_util.tree_leaves_with_path(made := compiled(params, state, put(g)))
                if where is not None:
                    away = [
                        (k, x)
                        for k, x in after
                        if not x.sharding.is_equivalent_to(where(x), x.ndim)
                    ]
                    moved |= {f"{jax.tree_util.keystr(k)} {x.shape}: {x.sharding}" for k, x in away}
                log.append({jax.tree_util.keystr(k): np.asarray(x).tobytes() for k, x in after})
                params, state = put(made[:2])
        return *logs, compiled.as_text(), sorted(moved)

    def differ(one, other):
        """Which arrays, and at which step first."""
        assert all(a.keys() == b.keys() for a, b in zip(one, other, strict=True))
        steps = [
            (i, path)
            for i, (a, b) in enumerate(zip(one, other, strict=True))
            for path in a
            if a[path] != b[path]
        ]
        return [f"{path} at step {i}" for i, path in steps if i == min(steps)[0]]

    results = {}
    turn = 0
    for name, (member, storage, link, _) in CASES.items():
        tx = transformation(member, storage, link)
        alone, again, _, _ = run(tx, None)
        results[name] = {"again": differ(alone, again), "moving": alone[0] != alone[-1]}
        for count in DEVICES[name]:
            where, layout = placing(count, turn)
            turn += 1
            log, again, text, moved = run(tx, where)
            results[f"{name} / {count}"] = {
                "devices": count,
                "layout": layout,
                "differ": differ(alone, log) + differ(log, again),
                "moved": moved,
                "collectives": collectives(text),
            }

    mesh = Mesh(np.array(jax.devices()), ("x",))
    x = jax.device_put(jnp.ones((256, 256)), NamedSharding(mesh, P("x")))
    turned = jax.jit(jnp.transpose, out_shardings=NamedSharding(mesh, P("x"))).lower(x).compile()
    results["transposed"] = collectives(turned.as_text())
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
