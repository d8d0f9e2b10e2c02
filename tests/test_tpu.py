"""One pass over memory on a TPU, by its own compiler, which needs no TPU: a step accesses what goes in and what comes out."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

import adam_jax
from benchmarks.tpu import GENERATIONS, LEAF, SETUPS, TEMPORARY, TREES, abstract, compile_step

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU\'s compiler, libtpu, is not installed: pip install -e ".[tpu-aot]"',
)

BOUND = [name for name, setup in SETUPS.items() if setup.bound is not None]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", BOUND)
def test_a_step_is_one_pass_over_memory(name, generation, tree):
    optimizer, bound, dtype = SETUPS[name]
    _, cost = compile_step(optimizer, abstract(TREES[tree], dtype), generation)
    assert cost.needed <= cost.accessed <= bound
    assert cost.temporary <= TEMPORARY


COLLECTIVE = re.compile(r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+|ragged-\S+)(?:-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def collectives(text):
    """How many elements each collective of a program moves."""
    return [
        sum(math.prod(map(int, filter(None, shape.split(",")))) for shape in SHAPE.findall(result))
        for result in COLLECTIVE.findall(text)
    ]


@pytest.mark.parametrize("spec", [PartitionSpec("x", None), PartitionSpec(None, "x")], ids=["rows", "columns"])
@pytest.mark.parametrize("name", BOUND)
def test_shards_exchange_nothing_but_scalars(name, spec):
    optimizer, bound, dtype = SETUPS[name]
    (params,) = abstract(TREES[LEAF], dtype)
    compiled, cost = compile_step(optimizer, params, "v5e", spec)
    found = collectives(compiled.as_text())
    assert bool(found) == ("8bit" in name)  # the next scale's maximum, and nothing where there is no scale
    assert all(elements <= 4 for elements in found)
    assert cost.needed <= cost.accessed <= bound
    assert cost.temporary <= TEMPORARY
    shardings = jax.tree.leaves(compiled.output_shardings)
    shapes = [leaf.shape for leaf in jax.tree.leaves((params, jax.eval_shape(optimizer.init, params)))]
    whole = [shape == params.shape for shape in shapes]
    assert sum(whole) == 3
    split = tuple(size // 4 if axis else size for size, axis in zip(params.shape, spec, strict=True))
    for sharding, shape in zip(shardings, shapes, strict=True):
        assert sharding.shard_shape(shape) == (split if shape == params.shape else shape)


def test_collectives_are_found_and_measured():
    """Gathering a sharded parameter is a collective that is no scalar."""
    gathers = optax.stateless(lambda updates, params: jax.tree.map(lambda g: jnp.sort(g, axis=0), updates))
    compiled, _ = compile_step(gathers, *abstract(((512, 1024),)), "v5e", PartitionSpec("x", None))
    assert max(collectives(compiled.as_text())) >= 512 * 1024 // 4


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "8bit"])
def test_every_member_compiles(storage):
    """In one program, which takes half of the time."""
    members = {name: getattr(adam_jax, name)(1e-3, storage=storage) for name in adam_jax.family.__all__}
    params = {name: abstract(((512, 1024), (1024,))) for name in members}
    optimizer = optax.partition(members, {name: name for name in members})
    _, cost = compile_step(optimizer, params, "v5e")
    assert cost.needed <= cost.accessed
