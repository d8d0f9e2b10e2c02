"""What a TPU's own compiler makes of a step: `python -m benchmarks.tpu`.

It is in libtpu (`pip install -e ".[tpu-aot]"`) and needs no TPU: it compiles for one that is
described to it, and tells how many bytes of memory the program reads and writes, and how many it
needs beside its arguments and results. For a step that only memory limits, that is its speed.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import adam_jax
from benchmarks import _trees
from benchmarks._table import Table, installed, show

LEAF, MODEL = "8192x4096", "gpt2-small"
TREES: dict[str, _trees.Shapes] = {LEAF: ((8192, 4096),), MODEL: _trees.TREES[MODEL]}

GENERATIONS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
"""By name: four chips of each, as the compiler calls them."""

OPTIONS = {"xla_msa_enable": "false"}
"""No copies to the chip's own memory ahead of the pass. Left to itself the compiler makes them of
small arrays, most of a model's leaves, and counts those bytes twice: once for the copy, once for
the pass that then reads them where they cost next to nothing. GPT-2's tree would be 37 bytes a
parameter in place of 28, Optax's Adam too. Without copies a byte counted is one of main memory.
Reserving all of that memory for the pass (`xla_tpu_scoped_vmem_limit_kib`) does the same, and
compiles longer. """

TEMPORARY = 0.25
"""The bound on temporary bytes per parameter.

The scale of a row takes 44 bytes beside it: 0.06 per parameter for rows of 768.
"""


class Setup(NamedTuple):
    """A way to rest.

    Attributes:
      optimizer: the transformation.
      bound: on bytes accessed a parameter; `None` where none is promised.
      dtype: of parameters and gradients.
    """

    optimizer: optax.GradientTransformation
    bound: float | None
    dtype: Any = jnp.float32


OPTAX = "Optax's adam"


def _setups() -> Iterator[tuple[str, Setup]]:
    yield OPTAX, Setup(optax.adam(1e-3), None)
    for storage, bound in (("float32", 28.2), ("bfloat16", 20.2), ("8bit", 16.4)):
        yield storage, Setup(adam_jax.adam(1e-3, storage=storage), bound)
    for link, bound in ((adam_jax.round_stochastically, 10.4), (adam_jax.compensate, None)):
        optimizer = adam_jax.chain(adam_jax.adam(1e-3, storage="8bit"), link())
        yield f"8bit, bf16 and {link.__name__}", Setup(optimizer, bound, jnp.bfloat16)


SETUPS = dict(_setups())


class Cost(NamedTuple):
    """Bytes for each parameter.

    Attributes:
      needed: of the arrays that the step is given and those that it returns; no step can access
        fewer.
      accessed: that it reads and writes, by the compiler's count.
      temporary: that it needs beside its arguments and results.
    """

    needed: float
    accessed: float
    temporary: float


@functools.cache
def devices(generation: str) -> tuple[Any, ...]:
    """Four TPUs of a generation, or those of a topology as the compiler calls it.

    They need not be there.
    """
    # Or libtpu asks the network which TPU this is, and keeps out every other process that compiles.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return tuple(
        topologies.get_topology_desc(
            platform="tpu", topology_name=GENERATIONS.get(generation, generation)
        ).devices
    )


def abstract(shapes: _trees.Shapes, dtype: Any = jnp.float32) -> list[jax.ShapeDtypeStruct]:
    """Parameters of those shapes that take no memory."""
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def compile_step(
    optimizer: optax.GradientTransformation,
    params: Any,
    generation: str,
    spec: PartitionSpec | None = None,
) -> tuple[Any, Cost]:
    """Compiles update and apply, parameters and state donated.

    Args:
      optimizer: the transformation.
      params: abstract parameters.
      generation: of the TPU.
      spec: how parameters, and what has their shape, are split over an axis "x" of four chips; by
        default there is one chip.

    Returns:
      What was compiled, and its cost on one chip.
    """

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        with jax.numpy_dtype_promotion(
            "standard"
        ):  # Optax adds updates of another dtype than the parameters'
            return optax.apply_updates(params, updates), state

    chips = devices(generation)[: 1 if spec is None else None]
    mesh = Mesh(np.asarray(chips), ("x",))

    def placed(leaf: Any, its: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=its)

    where = NamedSharding(mesh, PartitionSpec() if spec is None else spec)
    states = jax.eval_shape(optimizer.init, params)
    kept = adam_jax.state_shardings(optimizer, params, where)
    held = jax.tree.map(lambda leaf: placed(leaf, where), params)
    arguments = (held, jax.tree.map(placed, states, kept), held)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile(OPTIONS)
    needed = sum(map(_size, jax.tree.leaves((arguments, arguments[:2]))))
    accessed = compiled.cost_analysis()["bytes accessed"] * len(chips)
    temporary = compiled.memory_analysis().temp_size_in_bytes * len(chips)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return compiled, Cost(needed / count, accessed / count, temporary / count)


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def cost_table(trees: Sequence[str], generations: Sequence[str]) -> Table:
    """Bytes a parameter, a row for each tree, generation and setup."""
    rows = []
    for tree in trees:
        for generation in generations:
            for name, (optimizer, bound, dtype) in SETUPS.items():
                cost = compile_step(optimizer, abstract(TREES[tree], dtype), generation)[1]
                numbers = (f"{number:.3f}" for number in cost)
                rows.append((tree, generation, name, *numbers, *_verdict(cost, bound)))
    return Table(
        "Adam on a TPU: bytes a parameter of one jitted, donated step",
        ("tree", "TPU", "", "needed", "accessed", "temporary", "bound", "kept"),
        rows,
        f"By the compiler of libtpu {version('libtpu')}; no TPU took part. Needed: the arrays in "
        f"and out. Bound: on the bytes accessed; temporary ones are bound by {TEMPORARY}.",
    )


def _verdict(cost: Cost, bound: float | None) -> tuple[str, str]:
    if bound is None:
        return "", ""
    return (
        f"≤ {bound:.1f}",
        "yes" if cost.accessed <= bound and cost.temporary <= TEMPORARY else "no",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu", description=__doc__)
    parser.add_argument(
        "--trees", nargs="+", choices=TREES, default=list(TREES), help="default: all"
    )
    parser.add_argument(
        "--generations",
        nargs="+",
        choices=GENERATIONS,
        default=list(GENERATIONS),
        help="default: all",
    )
    parser.add_argument(
        "--quick", action="store_true", help="the single leaf only: a model takes minutes"
    )
    parser.add_argument("--output", type=Path, help="a markdown file to write the table to")
    options = parser.parse_args(arguments)
    if not installed("libtpu"):
        parser.error('libtpu is not installed: pip install -e ".[tpu-aot]"')
    jax.config.update(
        "jax_platforms", "cpu"
    )  # or JAX looks for a TPU where there is only its compiler
    show(
        [cost_table([LEAF] if options.quick else options.trees, options.generations)],
        options.output,
    )


if __name__ == "__main__":
    main()
