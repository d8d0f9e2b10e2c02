"""One pass over memory on a TPU, by its own compiler, which needs no TPU: a step accesses what goes
in and what comes out.
"""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import adam_jax
from benchmarks.tpu import (
    GENERATIONS,
    LEAF,
    MODEL,
    SETUPS,
    TEMPORARY,
    TREES,
    abstract,
    compile_step,
    devices,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU\'s compiler, libtpu, is not installed: pip install -e ".[tpu-aot]"',
)

BOUND = [name for name, setup in SETUPS.items() if setup.bound is not None]


# Compiling a model's step takes up to a minute, so it is compiled for one generation.
@pytest.mark.parametrize(
    ("generation", "tree"), [(its, LEAF) for its in GENERATIONS] + [("v5e", MODEL)]
)
@pytest.mark.parametrize("name", BOUND)
def test_a_step_is_one_pass_over_memory(name, generation, tree):
    optimizer, bound, dtype = SETUPS[name]
    _, cost = compile_step(optimizer, abstract(TREES[tree], dtype), generation)
    assert cost.needed <= cost.accessed <= bound
    assert cost.temporary <= TEMPORARY


COLLECTIVE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+|ragged-\S+)"
    r"(?:-start)?\("
)
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def collectives(text):
    """How many elements each collective of a program moves."""
    return [
        sum(math.prod(map(int, filter(None, shape.split(",")))) for shape in SHAPE.findall(result))
        for result in COLLECTIVE.findall(text)
    ]


OBSERVED = {
    "float32": (adam_jax.adam(1e-3), jnp.float32),
    "8bit": (
        adam_jax.chain(adam_jax.adam(1e-3, storage="8bit"), adam_jax.round_stochastically()),
        jnp.bfloat16,
    ),
}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", OBSERVED)
def test_an_observed_step_copies_nothing_and_looks_within_the_chips_own_memory(name, generation):
    """Of a large matrix, of a table with far more rows than the sample has elements, of a
    convolution's kernel and of a bias.
    """
    optimizer, dtype = OBSERVED[name]
    params = abstract(
        ((8192, 4096), (151936, 1024), (3, 3, 512, 512), (1000, 1000), (4096,)), dtype
    )
    _, plain = compile_step(optimizer, params, generation)
    _, cost = compile_step(adam_jax.observe(optimizer), params, generation)
    assert cost.temporary <= TEMPORARY
    assert (
        cost.accessed <= plain.accessed + 16
    )  # at the steps that look: what is sampled, and the gradients' norm


@pytest.mark.parametrize(
    "spec", [PartitionSpec("x", None), PartitionSpec(None, "x")], ids=["rows", "columns"]
)
@pytest.mark.parametrize("name", BOUND)
def test_shards_exchange_nothing_but_scalars_and_a_number_per_row(name, spec):
    """The largest code of each row, for the next scale, and only where the rows of 8-bit moments
    are cut.
    """
    optimizer, bound, dtype = SETUPS[name]
    (params,) = abstract(TREES[LEAF], dtype)
    compiled, cost = compile_step(optimizer, params, "v5e", spec)
    found = collectives(compiled.as_text())
    assert bool(found) == ("8bit" in name and spec[1] is not None)
    assert sum(found) <= 2 * params.shape[0]
    assert cost.needed <= cost.accessed <= bound
    assert cost.temporary <= TEMPORARY
    shardings = jax.tree.leaves(compiled.output_shardings)
    shapes = [
        leaf.shape for leaf in jax.tree.leaves((params, jax.eval_shape(optimizer.init, params)))
    ]
    whole = [shape == params.shape for shape in shapes]
    assert sum(whole) == 3
    split = tuple(
        size // 4 if axis else size for size, axis in zip(params.shape, spec, strict=True)
    )
    expected = {params.shape: split, (params.shape[0], 1): (split[0], 1)}
    for sharding, shape in zip(shardings, shapes, strict=True):
        assert sharding.shard_shape(shape) == expected.get(shape, shape)


def test_collectives_are_found_and_measured():
    """Gathering a sharded parameter is a collective that is no scalar."""
    gathers = optax.stateless(
        lambda updates, params: jax.tree.map(lambda g: jnp.sort(g, axis=0), updates)
    )
    compiled, _ = compile_step(gathers, *abstract(((512, 1024),)), "v5e", PartitionSpec("x", None))
    assert max(collectives(compiled.as_text())) >= 512 * 1024 // 4


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "8bit"])
def test_every_member_compiles(storage):
    """In one program, which takes half of the time."""
    members = {
        name: getattr(adam_jax, name)(1e-3, storage=storage) for name in adam_jax.family.__all__
    }
    params = {name: abstract(((512, 1024), (1024,))) for name in members}
    optimizer = optax.partition(members, {name: name for name in members})
    _, cost = compile_step(optimizer, params, "v5e")
    assert cost.needed <= cost.accessed


@pytest.mark.parametrize(
    ("storage", "bytes_needed"), [("float32", 28), ("bfloat16", 20), ("8bit", 16)]
)
@pytest.mark.parametrize("guard", [adam_jax.skip_nonfinite, adam_jax.skip_spikes])
def test_a_guard_reads_the_gradients_once_more_and_copies_nothing(guard, storage, bytes_needed):
    _, cost = compile_step(
        guard(adam_jax.adam(1e-3, storage=storage)), abstract(TREES[LEAF]), "v5e"
    )
    assert cost.accessed <= bytes_needed + 4.2
    assert cost.temporary <= TEMPORARY


CHANNEL = re.compile(r"channel_id=(\d+)")


@pytest.mark.parametrize("storage", ["float32", "8bit"])
def test_zero_on_eight_chips_sums_gradients_once_and_gathers_parameters_once(storage):
    """A data-parallel training step with its loss, and what a chip needs for it."""
    mesh = Mesh(np.asarray(devices("v5e:2x4")), ("data",))
    everywhere, split = (
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec("data")),
    )
    tx = adam_jax.adamw(1e-3, storage=storage)
    shapes = {"w1": (1024, 4096), "b1": (4096,), "w2": (4096, 1024)}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere)
        for name, shape in shapes.items()
    }
    shardings = adam_jax.state_shardings(tx, params, None, zero="data")
    state = jax.tree.map(
        lambda leaf, its: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=its),
        jax.eval_shape(tx.init, params),
        shardings,
    )
    images = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=split)

    def step(params, state, images):
        def loss(params):
            return jnp.mean(
                jnp.square(jax.nn.relu(images @ params["w1"] + params["b1"][None]) @ params["w2"])
            )

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(
        step,
        out_shardings=(jax.tree.map(lambda _: everywhere, params), shardings),
        donate_argnums=(0, 1),
    )
    compiled = jitted.lower(params, state, images).compile()

    # By channel: the compiler writes one exchange into several branches, and changes its shape, not
    # its size
    moved = {}
    for line in compiled.as_text().splitlines():
        found = re.search(
            r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+|ragged-\S+)"
            r"(?:-start)?\(",
            line,
        )
        if found:
            sizes = [
                math.prod(map(int, filter(None, shape.split(","))))
                for shape in SHAPE.findall(found[1])
            ]
            moved[found[2], CHANNEL.search(line)[1]] = sizes
    large = {
        kind: sum(
            size
            for (what, _), sizes in moved.items()
            if what == kind
            for size in sizes
            if size > 16
        )
        for kind in ("all-reduce", "all-gather")
    }
    elements = sum(map(math.prod, shapes.values()))
    assert large == {"all-reduce": elements, "all-gather": elements}
    assert {kind for kind, _ in moved} == {"all-reduce", "all-gather"}

    memory = compiled.memory_analysis()
    resting = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((params, state, images))
    )
    # Padding of scalars to whole tiles apart, a chip's arguments are whole parameters, an eighth of
    # the state, and its images.
    assert resting <= memory.argument_size_in_bytes <= 1.01 * resting
    assert memory.alias_size_in_bytes >= 0.99 * (memory.output_size_in_bytes)
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.argument_size_in_bytes <= 1.01 * (4 * elements + whole / 8 + 4 * 64 * 1024 / 8)
