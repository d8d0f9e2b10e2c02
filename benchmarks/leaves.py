"""How compile time and step time grow with the number of leaves: `python -m benchmarks.leaves`.

The contenders, the step and the way to measure are those of `benchmarks.step`. Trees of 10, 100 and
1,000 equal leaves are so small that a step costs what its leaves cost, not what their elements do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks._table import Table, show
from benchmarks._timing import Result, Times, compile_step, measure
from benchmarks._trees import LEAVES
from benchmarks.step import OPTAX, OPTIMIZERS, ratio_cell


def growth_table(results: Sequence[Result]) -> Table:
    """A row for each number of leaves and contender."""
    return Table(
        "Adam by the number of leaves of 32 × 32: update and apply in one jitted, donated step",
        (
            "tree",
            "",
            "step",
            "× Optax (quartiles)",
            "× linear",
            "compile",
            "× Optax (quartiles)",
            "× linear",
        ),
        [_row(results[0], result, name) for result in results for name in OPTIMIZERS],
        "Medians. × linear: the time a leaf, relative to that with the fewest leaves: 1 or less "
        "where time grows no faster.",
    )


def _row(fewest: Result, result: Result, name: str) -> tuple[str, ...]:
    step, compiled = float(np.median(result.steps[name])), float(np.median(result.compiles[name]))
    growth = [_per_leaf(r, r.compiles, name) for r in (result, fewest)]
    return (
        result.tree,
        name,
        f"{step * 1e3:.3f} ms",
        ratio_cell(result.steps, name),
        f"{_per_leaf(result, result.steps, name) / _per_leaf(fewest, fewest.steps, name):.2f}",
        f"{compiled:.3f} s",
        ratio_cell(result.compiles, name),
        f"{growth[0] / growth[1]:.2f}",
    )


def _per_leaf(result: Result, times: Times, name: str) -> float:
    return float(np.median(times[name])) / len(LEAVES[result.tree])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leaves", description=__doc__)
    parser.add_argument(
        "--trees",
        nargs="+",
        choices=LEAVES,
        default=list(LEAVES),
        help="default: all, from the fewest leaves on",
    )
    parser.add_argument("--repeats", type=int, help="timed calls of each step; default: 100")
    parser.add_argument("--compiles", type=int, help="timed compilations of each step; default: 5")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="10 and 100 leaves, 10 calls, 2 compilations: to see that it runs",
    )
    parser.add_argument("--output", type=Path, help="a markdown file to write the table to")
    options = parser.parse_args(arguments)
    calls = options.repeats or (10 if options.quick else 100)
    compiles = options.compiles or (2 if options.quick else 5)
    trees = list(LEAVES)[:2] if options.quick else options.trees

    jax.config.update("jax_enable_compilation_cache", False)
    compile_step(OPTIMIZERS[OPTAX], trees[0])  # the first in a process pays for what is loaded once
    show(
        [growth_table([measure(OPTIMIZERS, tree, calls, compiles) for tree in trees])],
        options.output,
    )


if __name__ == "__main__":
    main()
