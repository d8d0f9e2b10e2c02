"""`state_shardings`: every array of a state where it belongs, by rules that can be read here; then
real steps on eight devices.

The rules need no devices: an abstract mesh is enough. Everything else one process with eight
devices that are this machine's CPU does at once, and prints what it found: this file, as a script.
"""

import collections
import json
import math
import sys
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import moves, on_eight_devices
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import adam_jax as aj
from adam_jax.storage.scales import unpack

MEMBERS = aj.family.__all__
STORAGES = ("float32", "bfloat16", "8bit")
SOME = ("adam", "lamb", "adam_mini", "ademamix", "adopt")


def mesh_of(mode="Auto", **axes):
    """An abstract mesh."""
    return AbstractMesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(getattr(jax.sharding.AxisType, mode),) * len(axes),
    )


MESH = mesh_of(data=4, model=2)
PARAMS = {
    "w": jax.ShapeDtypeStruct((16, 8), jnp.float32),
    "deep": [jax.ShapeDtypeStruct((3, 6, 10), jnp.bfloat16)],
    "b": jax.ShapeDtypeStruct((8,), jnp.float32),
    "n": jax.ShapeDtypeStruct((8,), jnp.int32),
}
SPECS = {"w": P(None, "model"), "deep": [P("model", None, None)], "b": P(), "n": P()}
EVEN = {"w": PARAMS["w"], "b": PARAMS["b"]}


def specs(tree):
    """The spec of each array by its path, without the `None`s at its end."""
    found = {}
    for path, sharding in jax.tree_util.tree_leaves_with_path(tree):
        entries = list(sharding.spec)
        while entries and entries[-1] is None:
            entries.pop()
        found[jax.tree_util.keystr(path)] = tuple(entries)
    return found


def at(found, *parts):
    """The specs of the arrays whose path has all parts."""
    return [spec for path, spec in found.items() if all(part in path for part in parts)]


def test_moments_follow_their_parameter_and_all_else_is_everywhere(member):
    tx = aj.chain(member(0.1), aj.compensate())
    specs_of = {"w": P(None, "model"), "deep": [P(None, "model")], "b": P(), "n": P()}
    made = aj.state_shardings(tx, PARAMS, specs_of, mesh=MESH)
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(made) == jax.tree.structure(shapes)
    for (path, its), leaf in zip(
        jax.tree_util.tree_leaves_with_path(made), jax.tree.leaves(shapes), strict=True
    ):
        place = jax.tree_util.keystr(path)
        whole = {"['w']": (16, 8), "['deep'][0]": (3, 6, 10)}
        owner = next((name for name in whole if place.endswith(name)), None)
        expected = [None] * leaf.ndim
        if owner and leaf.shape[1] == whole[owner][1]:
            expected[1] = "model"
        assert list(its.spec) + [None] * (leaf.ndim - len(its.spec)) == expected, place
        assert its.mesh == MESH
        its.shard_shape(leaf.shape)


def test_a_block_shares_what_is_not_cut():
    """ν of a block has one row: cut along the columns it follows, cut along the rows it is
    everywhere.
    """
    tx = aj.adam_mini(0.1)
    columns = specs(aj.state_shardings(tx, EVEN, {"w": P(None, "model"), "b": P()}, mesh=MESH))
    rows = specs(aj.state_shardings(tx, EVEN, {"w": P("model"), "b": P()}, mesh=MESH))
    assert at(columns, "nu['w']") == [(None, "model")]
    assert (at(rows, "mu['w']"), at(rows, "nu['w']")) == ([("model",)], [()])


def test_zero_cuts_along_the_first_axis_that_is_whole_and_divides():
    params = {
        "first": jnp.zeros((8, 8)),
        "second": jnp.zeros((6, 8)),
        "behind": jnp.zeros((8, 8)),
        "within": jnp.zeros((16, 3)),
        "done": jnp.zeros((8, 4)),
        "both": jnp.zeros((16, 5)),
    }
    given = {
        "first": P(),
        "second": P(),
        "behind": P("model"),
        "within": P("model"),
        "done": P("data"),
        "both": P(("model", "data")),
    }
    made = specs(aj.state_shardings(aj.momentum(0.1), params, given, mesh=MESH, zero="data"))
    expected = {
        "first": ("data",),
        "second": (None, "data"),
        "behind": ("model", "data"),
        "within": (("model", "data"),),
        "done": ("data",),
        "both": (("model", "data"),),
    }
    assert {name: at(made, f"mu['{name}']")[0] for name in params} == expected


def test_zero_over_two_axes_and_over_what_the_parameters_leave():
    made = specs(aj.state_shardings(aj.adam(0.1), EVEN, P(), mesh=MESH, zero=("data", "model")))
    assert at(made, "mu['w']") == at(made, "nu['b']") == [(("data", "model"),)]
    made = specs(
        aj.state_shardings(
            aj.adam(0.1), EVEN, {"w": P(None, "data"), "b": P()}, mesh=MESH, zero=("data", "model")
        )
    )
    assert at(made, "mu['w']") == [("model", "data")]


def test_all_arrays_of_a_parameter_are_cut_alike():
    """Along the columns, for the rows of adam_mini's ν are one: μ and ν of one element are then on
    one device.
    """
    made = specs(aj.state_shardings(aj.adam_mini(0.1), EVEN, P(), mesh=MESH, zero="data"))
    assert at(made, "mu['w']") == at(made, "nu['w']") == [(None, "data")]


def test_zero_shares_out_the_state_of_rounding_and_averages_too():
    tx = aj.chain(aj.adam(0.1, storage="8bit"), aj.compensate(), aj.stages.average_parameters(0.9))
    half = {"w": jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)}
    made = specs(aj.state_shardings(tx, half, P(), mesh=MESH, zero="data"))
    assert at(made, "['w']") == [("data",)] * 6
    assert at(made, "scale") == [("data",)] * 2


def test_scales_are_sharded_as_their_rows_are():
    """Where the axis that shares a scale is cut, each device has the scale; one scale per leaf is
    on every device.
    """
    shapes = {"rows": (32, 256), "heads": (16, 4, 64), "short": (128, 64), "vector": (4096,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    for tx in (
        aj.adam(0.1, storage="8bit"),
        optax.chain(aj.skip_nonfinite(aj.adam(0.1, storage="8bit"))),
    ):
        first = specs(aj.state_shardings(tx, params, P("data"), mesh=MESH))
        last = specs(
            aj.state_shardings(
                tx,
                params,
                {n: P(*[None] * (len(shape) - 1), "data") for n, shape in shapes.items()},
                mesh=MESH,
            )
        )
        for name in shapes:
            cut = ("data",) if name in ("rows", "heads") else ()
            assert at(first, "scale", f"['{name}']") == [cut] * 2
            assert at(last, "scale", f"['{name}']") == [()] * 2


def test_scales_find_their_parameter_in_flax_boxes():
    """Boxes carry names of axes, which scales do not have."""
    linen = pytest.importorskip("flax.linen")
    boxed = {"w": linen.Partitioned(jnp.zeros((32, 256)), ("rows", None))}
    tx = aj.adam(0.1, storage="8bit")
    made = aj.state_shardings(tx, boxed, P("data"), mesh=MESH)
    assert at(specs(made), "scale") == [("data",)] * 2
    assert [type(leaf) for leaf in jax.tree.leaves(tx.init(boxed)[0].scales)] == [
        type(jnp.zeros(()))
    ] * 2


def test_what_cannot_be_cut_is_said():
    with pytest.warns(UserWarning, match="divides by the 4 devices") as caught:
        made = aj.state_shardings(
            aj.adam(0.1), PARAMS, SPECS | {"deep": [P()]}, mesh=MESH, zero="data"
        )
    (said,) = (str(warning.message) for warning in caught)
    assert all(f"{moment}['deep'][0] (3, 6, 10)" in said for moment in ("mu", "nu"))
    assert "['w']" not in said
    assert at(specs(made), "mu['deep']") == [()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aj.state_shardings(aj.adam(0.1), PARAMS, P(), mesh=mesh_of(data=1), zero="data")
        aj.state_shardings(aj.adam(0.1), {"empty": jnp.zeros((0, 3))}, P(), mesh=MESH, zero="data")


def foreign():
    labels = {"w": "a", "b": "b"}
    yield "optax.adam", optax.adam(0.1), 4
    yield "chain", optax.chain(optax.clip(1.0), aj.adam(0.1)), 4
    yield "masked", optax.masked(aj.adam(0.1), {"w": True, "b": False}), 2
    yield "partition", optax.partition({"a": aj.adam(0.1), "b": aj.momentum(0.1)}, labels), 3
    yield "MultiSteps", optax.MultiSteps(aj.adam(0.1), 2), 6
    yield "inject", optax.inject_hyperparams(aj.adam)(0.1), 4
    yield "guard", aj.skip_nonfinite(aj.adam(0.1)), 4
    yield "adafactor", optax.adafactor(0.1, min_dim_size_to_factor=4), 1


@pytest.mark.parametrize(
    ("name", "tx", "arrays"), list(foreign()), ids=[name for name, *_ in foreign()]
)
@pytest.mark.usefixtures("standard_promotion")
def test_states_of_others(name, tx, arrays):
    """How many of their arrays are a parameter's; of a factored ν, rows and columns are no
    parameter's.
    """
    made = specs(aj.state_shardings(tx, EVEN, {"w": P("data"), "b": P("data")}, mesh=MESH))
    cut = {path: spec for path, spec in made.items() if spec}
    assert set(cut.values()) == {("data",)}
    assert len(cut) == arrays, cut


def test_shardings_may_be_one_or_a_prefix_or_those_of_the_arrays():
    tx = aj.adam(0.1)
    one = NamedSharding(MESH, P())
    everywhere = aj.state_shardings(tx, PARAMS, one)
    assert set(specs(everywhere).values()) == {()}
    whole = {"w": P("data"), "deep": [P()], "b": P(), "n": P()}
    prefix = {"w": P("data"), "deep": P(), "b": P(), "n": P()}
    assert specs(aj.state_shardings(tx, PARAMS, whole, mesh=MESH)) == specs(
        aj.state_shardings(tx, PARAMS, prefix, mesh=MESH)
    )
    placed = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=NamedSharding(MESH, P("data"))),
        EVEN,
    )
    assert specs(aj.state_shardings(tx, placed, None)) == specs(
        aj.state_shardings(tx, EVEN, P("data"), mesh=MESH)
    )
    leaf = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    assert at(specs(aj.state_shardings(tx, leaf, P("data"), mesh=MESH)), ".mu") == [("data",)]


def test_a_single_array_owns_its_moments_alone():
    """By its path, which is empty, every array would end in it; weights and rings of its shape are
    not its.
    """
    for shape, own in (((2, 2), 2), ((128,), 2), ((), 0)):
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = aj.state_shardings(
                aj.skip_spikes(aj.adam(0.1)), leaf, P(), mesh=mesh_of(data=2), zero="data"
            )
        assert len(list(filter(None, specs(made).values()))) == own
    named = {
        "b1": jax.ShapeDtypeStruct((4,), jnp.float32),
        "weight": jax.ShapeDtypeStruct((4, 4), jnp.float32),
    }
    module = collections.namedtuple("Module", named)(**named)
    for tree in (named, module):
        made = specs(aj.state_shardings(aj.adam(0.1), tree, P("data"), mesh=MESH))
        assert len(list(filter(None, made.values()))) == 4


def test_along_explicit_axes_nothing_is_cut_twice():
    """JAX would refuse to add a gradient that is cut otherwise."""
    mesh = mesh_of("Explicit", data=4, model=2)
    with pytest.warns(UserWarning, match="nu"):
        made = specs(
            aj.state_shardings(
                aj.adam_mini(0.1), EVEN, {"w": P(None, "model"), "b": P()}, mesh=mesh, zero="data"
            )
        )
    assert (at(made, "mu['w']"), at(made, "nu['w']")) == ([("data", "model")], [(None, "model")])


REFUSED = {
    "no transformation": (
        lambda: aj.state_shardings(aj.adam, EVEN, P()),
        TypeError,
        "expected a gradient transformation",
    ),
    "no mesh": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, P()),
        ValueError,
        "as mesh=, or by jax.set_mesh",
    ),
    "no sharding": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, {"w": "data", "b": P()}, mesh=MESH),
        TypeError,
        "['w'] found 'data'",
    ),
    "no arrays": (
        lambda: aj.state_shardings(aj.adam(0.1), {"w": np.ones(3)}, None),
        TypeError,
        "['w'] found None",
    ),
    "another tree": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, {"w": P()}, mesh=MESH),
        ValueError,
        "shardings: found the structure",
    ),
    "no such axis": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, P(), mesh=MESH, zero="x"),
        ValueError,
        "zero: found 'x'; expected axes",
    ),
    "indivisible": (
        lambda: aj.state_shardings(aj.adam(0.1), {"w": np.ones(3)}, P("data"), mesh=MESH),
        ValueError,
        "of shape (3,)",
    ),
    "no name": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, P(), mesh=MESH, zero=3),
        ValueError,
        "zero: found 3; expected the name",
    ),
    "twice": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, P(), mesh=MESH, zero=("data",) * 2),
        ValueError,
        "several different ones",
    ),
    "no mesh at all": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, P(), mesh="data"),
        TypeError,
        "mesh: found 'data'",
    ),
    "unconstrained": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, P(P.UNCONSTRAINED), mesh=MESH),
        ValueError,
        "UNCONSTRAINED",
    ),
    "two meshes": (
        lambda: aj.state_shardings(
            aj.adam(0.1), EVEN, NamedSharding(mesh_of(data=2), P()), mesh=MESH
        ),
        ValueError,
        "found 2 meshes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match="state_shardings") as caught:
        call()
    assert message in str(caught.value)


# On eight devices


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(__file__)


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


def test_members_take_the_same_steps_on_any_mesh(found):
    """Fed the same gradients, parameters and state are those of one device, also of members that
    need whole leaves.
    """
    same_on_any_mesh(found["same"], SOME)


@pytest.mark.slow
def test_every_member_takes_the_same_steps_on_any_mesh():
    same_on_any_mesh(on_eight_devices(__file__, "every member"), MEMBERS)


@pytest.mark.parametrize("name", STEPS)
def test_a_device_holds_its_share_of_the_state(found, name):
    total, scalars, per_device = found["steps"][name]["bytes"]
    assert per_device == [(total - scalars) / 8 + scalars] * 8
    assert scalars < 0.01 * total


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_summed_once_and_parameters_gathered_once(found, name):
    """All else that travels is a scalar: whether all gradients are finite.

    Rows, and so their scales, are on one device each.
    """
    moved, elements = found["steps"][name]["moved"], found["steps"][name]["elements"]
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
    assert found["steps"][name]["away"] == []


def test_inside_shard_map_a_step_is_the_same(found):
    assert found["shard_map"]["float32"] == []


def test_inside_shard_map_devices_share_scales_and_verdicts(found):
    """Along a row that is cut.

    They are those of one device within an octave: parts of an array have other random bits.
    """
    assert found["shard_map"]["scales differ"] == []
    assert found["shard_map"]["verdicts"] == [1] * 8
    assert found["shard_map"]["moved by poison"] == []


KNOWN = hasattr(jax.core.ShapedArray, "vma") or hasattr(jax.core.ShapedArray, "manual_axis_type")
"""Whether JAX tells along which axes an array is cut.

Else rows on several devices share a scale, which is too large for some.
"""


def apart(found, expected):
    """How far each shard is from its part of the expected array."""
    return [np.asarray(shard.data) - expected[shard.index] for shard in found.addressable_shards]


def main():
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if sys.argv[1:]:
        sys.stdout.write(json.dumps(same_steps(MEMBERS)) + "\n")
        return
    results = {
        "same": same_steps(SOME),
        "steps": {name: train(step) for name, step in STEPS.items()},
        "shard_map": mapped(),
    }
    sys.stdout.write(json.dumps(results) + "\n")


def mesh_on(shape, names, mode="Auto"):
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(
        devices, names, axis_types=(getattr(jax.sharding.AxisType, mode),) * len(shape)
    )


def apply(params, updates):
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def raw(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(x).tobytes()
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


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
    main()
