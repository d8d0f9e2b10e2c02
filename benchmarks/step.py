"""What one step of Adam costs: `python -m benchmarks.step`.

One jitted update + apply with donated parameters and state, ours and Optax's, next to PyTorch's
fused Adam in a process of its own. Machines are noisy, so contenders take turns call by call in
every order, arrays are made afresh several times, and each call is compared with the one of Optax
beside it. Optax takes part twice: the ratio of it to itself is what this machine, at this hour,
cannot tell from 1.

Then the storages of the moments, ours against ours, and against a copy of the parameters: what
memory alone would take.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import adam_jax
from benchmarks._table import NOT_INSTALLED, Table, installed, show
from benchmarks._timing import (
    AGAIN,
    COPY,
    FLOAT32,
    LEARNING_RATE,
    OPTAX,
    OURS,
    SHAPES,
    TORCH,
    Contender,
    Contenders,
    Result,
    Times,
    compile_step,
    measure,
    ratio,
)
from benchmarks._torch_step import TorchProcess
from benchmarks._trees import TREES
from benchmarks.kernels import kernel_table

STEP_BOUND, COMPILE_BOUND = 1.02, 1.0


OPTIMIZERS: Contenders = {
    OURS: Contender(adam_jax.adam(LEARNING_RATE)),
    OPTAX: Contender(optax.adam(LEARNING_RATE)),
    AGAIN: Contender(optax.adam(LEARNING_RATE)),
}


def _stored(storage: Any, *links: Any) -> Any:
    return adam_jax.chain(adam_jax.adam(LEARNING_RATE, storage=storage), *links)


STORAGES: Contenders = {
    FLOAT32: Contender(_stored("float32")),
    "bf16 moments": Contender(_stored("bfloat16")),
    "8-bit moments": Contender(_stored("8bit")),
    "8-bit moments, bf16 parameters rounded stochastically": Contender(
        _stored("8bit", adam_jax.round_stochastically()), "bfloat16"
    ),
    "bf16 parameters, compensated": Contender(
        _stored("float32", adam_jax.compensate()), "bfloat16"
    ),
    COPY: Contender(optax.scale(1.0)),
}
"""The copy reads parameters and gradients and writes their sum: 12 bytes a parameter, and no
arithmetic to speak of."""


# The tables.


def cost_table(results: Iterable[Result], torch_device: str) -> Table:
    """What a step takes of time and memory, a row for each tree and contender."""
    ratio_head = "× Optax (quartiles)"
    return Table(
        "Adam: update and apply in one jitted, donated step",
        (
            "tree",
            "",
            "step",
            ratio_head,
            "compile",
            ratio_head,
            "bytes accessed",
            "a parameter",
            "temporary bytes",
        ),
        [
            _cost_row(result, name, torch_device)
            for result in results
            for name in (*OPTIMIZERS, TORCH)
        ],
        "Medians. Compile: trace, lower and compile with empty caches. Bytes: XLA's count, a "
        "float32.",
    )


def _cost_row(result: Result, name: str, torch_device: str) -> tuple[str, ...]:
    label = f"{TORCH} fused, {torch_device}" if name == TORCH else name
    if name not in result.steps:
        return (result.tree, name, NOT_INSTALLED, *[""] * 6)
    step = (f"{np.median(result.steps[name]) * 1e3:.2f} ms", ratio_cell(result.steps, name))
    if name not in result.compiled:
        return (result.tree, label, *step, *[""] * 5)
    compiled = result.compiled[name]
    parameters = sum(int(np.prod(shape)) for shape in SHAPES[result.tree])
    return (
        result.tree,
        label,
        *step,
        f"{np.median(result.compiles[name]):.3f} s",
        ratio_cell(result.compiles, name),
        _count_cell(compiled.accessed),
        "" if compiled.accessed is None else f"{compiled.accessed / parameters:.2f}",
        _count_cell(compiled.temporary),
    )


def _count_cell(count: int | None) -> str:
    return "not counted" if count is None else f"{count:,}"


def ratio_cell(times: Times, name: str) -> str:
    """The median of paired ratios to Optax, and the quartiles around it."""
    if name == OPTAX:
        return "1"
    low, median, high = ratio(times, name)
    return f"{median:.3f} ({low:.3f}–{high:.3f})"


def bound_table(results: Iterable[Result]) -> Table:
    """Whether ours keeps within its bounds."""
    return Table(
        "Ours against its bounds",
        ("tree", "", "ours / Optax", "bound", "kept", "Optax again / Optax"),
        [row for result in results for row in _bound_rows(result)],
    )


def _bound_rows(result: Result) -> Iterator[tuple[str, ...]]:
    for what, times, bound in (
        ("step", result.steps, STEP_BOUND),
        ("compile", result.compiles, COMPILE_BOUND),
    ):
        found, noise = (ratio(times, name).median for name in (OURS, AGAIN))
        yield (
            result.tree,
            what,
            f"{found:.3f}",
            f"≤ {bound:.2f}",
            _yes(found <= bound),
            f"{noise:.3f}",
        )
    mine, theirs = (result.compiled[name].accessed for name in (OURS, OPTAX))
    if mine is not None and theirs is not None:
        yield (
            result.tree,
            "bytes accessed",
            f"{mine / theirs:.7f} ({mine - theirs:+,} bytes)",
            "≤ 1",
            _yes(mine <= theirs),
            "1",
        )


def storage_table(results: Iterable[Result]) -> Table:
    """What each storage takes, and how much memory it moves in that time."""
    return Table(
        "Adam by storage: the same step, ours",
        (
            "tree",
            "",
            "step",
            "× f32 (quartiles)",
            "bytes a parameter at rest",
            "moved in a step",
            "GB/s",
        ),
        [_storage_row(result, name) for result in results for name in STORAGES],
        "Moved: parameters and state read and written once, gradients read once. More is moved "
        "where XLA makes several loops.",
    )


def _storage_row(result: Result, name: str) -> tuple[str, ...]:
    contender = STORAGES[name]
    params = [jax.ShapeDtypeStruct(shape, contender.dtype) for shape in SHAPES[result.tree]]
    sizes = adam_jax.state_bytes(contender.optimizer, params)
    moved = (2 * sizes.total + sizes.parameters) / sizes.elements
    seconds = float(np.median(result.steps[name]))
    low, median, high = ratio(result.steps, name, FLOAT32)
    times = "1" if name == FLOAT32 else f"{median:.2f} ({low:.2f}–{high:.2f})"
    speed = moved * sizes.elements / seconds / 1e9
    rests = f"{sizes.total / sizes.elements:.2f}"
    return (
        result.tree,
        name,
        f"{seconds * 1e3:.2f} ms",
        times,
        rests,
        f"{moved:.2f}",
        f"{speed:.1f}",
    )


def _yes(kept: bool) -> str:
    return "yes" if kept else "no"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument(
        "--trees", nargs="+", choices=TREES, default=list(TREES), help="default: all"
    )
    parser.add_argument(
        "--storage-trees",
        nargs="*",
        choices=TREES,
        default=["4096x4096"],
        help="for the storages; default: 4096x4096",
    )
    parser.add_argument("--repeats", type=int, help="timed calls of each step; default: 100")
    parser.add_argument("--compiles", type=int, help="timed compilations of each step; default: 9")
    parser.add_argument(
        "--quick", action="store_true", help="10 calls and 2 compilations: to see that it runs"
    )
    parser.add_argument("--output", type=Path, help="a markdown file to write the tables to")
    options = parser.parse_args(arguments)
    calls = options.repeats or (10 if options.quick else 100)
    compiles = options.compiles or (2 if options.quick else 9)

    jax.config.update("jax_enable_compilation_cache", False)
    for contender in OPTIMIZERS.values():
        compile_step(contender, "4096x4096")  # the first in a process pays for what is loaded once
    with ExitStack() as stack:
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        torch = stack.enter_context(TorchProcess(device)) if installed("torch") else None
        results = [measure(OPTIMIZERS, tree, calls, compiles, torch) for tree in options.trees]
    stored = [measure(STORAGES, tree, calls, compiles=1) for tree in options.storage_trees]
    tables = [
        cost_table(results, torch.device if torch else ""),
        bound_table(results),
        storage_table(stored),
        kernel_table(),
    ]
    show(tables, options.output)
