"""Does it train to the same loss in fewer bytes.

`python -m benchmarks.low_precision --mnist mnist.npz`.

Five networks are trained with every storage of moments and parameters. A seed gives all variants
the same start and the same batches. The learning rates are constant, and small: an update of 1e-4
is below half of the last bit of a bfloat16 parameter from 0.05 on, which is where rounding to
nearest stops learning.

Every run that ends is kept in a file of its own, under a digest of the compiled program's source
and of all arrays that go in. So a run that was killed is gone on with, what has not changed is not
run again, and what has changed, in whatever file, is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks._data import (
    FREQUENT,
    MNIST,
    SHAKESPEARE,
    Data,
    mnist,
    python_help,
    small_digits,
    text,
    words,
)
from benchmarks._figure import draw
from benchmarks._runs import LAST, SEEDS, VARIANTS, Result, measure
from benchmarks._table import Table, installed, show
from benchmarks._training import TASKS, Task, begin, quick

TESTS = {
    "digits": "test accuracy, %",
    "text": "test bits per character",
    "words": "test bits per word",
}


# The tables.


def table(task: Task, data: Data, results: Sequence[Result]) -> Table:
    """What each variant came to, and whether it is where the first one, f32, is."""
    start = begin(task, task.training_set(data), 0)[0]
    seeds, parameters = len(results[0].losses), sum(leaf.size for leaf in jax.tree.leaves(start))
    behind = f" behind one of the {FREQUENT} most frequent words" if task.reads == "words" else ""
    few = f" on {task.examples:,} examples" if task.examples else ""
    return Table(
        f"{task.title}, {data.source}: {parameters:,} parameters, {task.steps} steps of "
        f"{task.batch_size}{few}, learning rate {task.learning_rate:g}, seeds: {seeds}",
        (
            "",
            "bytes per parameter",
            "training loss",
            "over f32's, seed by seed",
            "within 1 sd of f32",
            TESTS[task.reads],
        ),
        [
            _row(result, results[0], ".2f" if task.reads == "digits" else ".3f")
            for result in results
        ],
        "Means ± standard deviations over the seeds. The loss is that of the parameters at the "
        f"end, on {task.judged:,} examples of the training set{behind}, the same ones for all. "
        "Bytes: parameters and optimizer state, between two steps.",
    )


def _row(result: Result, reference: Result, precision: str) -> tuple[str, ...]:
    difference, within = result.losses - reference.losses, ""
    ratio = result.losses / reference.losses - 1
    if len(difference) > 1:
        within = "yes" if abs(difference.mean()) <= reference.losses.std(ddof=1) else "no"
    compared = ("", "") if result is reference else (_mean(100 * ratio, "+.2f") + " %", within)
    return (
        result.label,
        f"{result.size:.2f}",
        _mean(result.losses, ".4g"),
        *compared,
        _mean(result.tests, precision),
    )


def _mean(values: np.ndarray, precision: str) -> str:
    mean = format(values.mean(), precision)
    return f"{mean} ± {values.std(ddof=1):{precision.lstrip('+')}}" if len(values) > 1 else mean


# The command.


def main() -> None:
    """Trains what has not been trained, and prints and draws all of it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.low_precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--mnist", type=Path, help=f"{MNIST}; needed for {_those_reading('digits')}"
    )
    parser.add_argument(
        "--text", type=Path, help=f"a text of a megabyte or more; default: {SHAKESPEARE}"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        metavar="TASK",
        help=f"of and by default: {', '.join(TASKS)}",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="VARIANT",
        help=f"beside f32; of and by default: {', '.join(VARIANTS)}",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: %(default)s")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"does it run at all: a few steps and one seed, by default of f32 and {LAST}, on "
        "scikit-learn's digits and Python's help where no data is given",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("low_precision_runs"),
        help="keeps the runs; default: %(default)s",
    )
    parser.add_argument("--output", type=Path, help="a markdown file to write the tables to")
    parser.add_argument(
        "--figure", type=Path, help="where to draw; default: figure.png beside the runs"
    )
    options = parser.parse_args()

    variants = list(
        dict.fromkeys(("f32", *(options.variants or ([LAST] if options.quick else VARIANTS))))
    )
    seeds = options.seeds[:1] if options.quick else options.seeds
    tasks = [quick(TASKS[name]) if options.quick else TASKS[name] for name in options.tasks]
    try:
        data = {
            reads: _data(reads, options) for reads in dict.fromkeys(task.reads for task in tasks)
        }
    except (OSError, ValueError) as error:
        parser.error(str(error))

    options.output_dir.mkdir(parents=True, exist_ok=True)
    tell = _counter(len(tasks) * len(variants) * len(seeds))
    results = {
        task.name: list(measure(task, data[task.reads], variants, seeds, options.output_dir, tell))
        for task in tasks
    }
    show([table(task, data[task.reads], results[task.name]) for task in tasks], options.output)
    if installed("matplotlib"):
        figure = options.figure or options.output_dir / "figure.png"
        panels = {f"{task.title}\n{data[task.reads].source}": results[task.name] for task in tasks}
        draw(panels, [variant.label for variant in VARIANTS.values()], figure)
        print(f"Drawn: {figure}")
    else:
        print("Nothing drawn: matplotlib is not installed.")


def _data(reads: str, options: argparse.Namespace) -> Data:
    if reads != "digits":
        return (
            python_help(reads)
            if options.quick and not options.text
            else (words if reads == "words" else text)(options.text)
        )
    if options.mnist:
        return mnist(options.mnist)
    if options.quick:
        return small_digits()
    raise ValueError(f"--mnist: expected {MNIST}. Without it: --tasks {_those_reading('text')}.")


def _those_reading(reads: str) -> str:
    return " ".join(name for name, task in TASKS.items() if task.reads == reads)


def _counter(total: int) -> Callable[[str], None]:
    done = iter(range(1, total + 1))
    return lambda said: print(f"{next(done)} of {total}: {said}", file=sys.stderr, flush=True)
