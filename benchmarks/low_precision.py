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
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import adam_jax
from benchmarks._figure import draw
from benchmarks._table import Table, installed, show
from benchmarks._training import (
    FREQUENT,
    MNIST,
    SHAKESPEARE,
    TASKS,
    Data,
    Task,
    begin,
    mnist,
    python_help,
    quick,
    rest,
    small_digits,
    text,
    trainer,
    words,
)

SEEDS = (0, 1, 2, 3, 4)
POINTS = 60
"""Of a loss curve: each is the mean over several batches."""

TESTS = {
    "digits": "test accuracy, %",
    "text": "test bits per character",
    "words": "test bits per word",
}


class Variant(NamedTuple):
    """A way for parameters and moments to rest.

    Attributes:
      label: in words.
      params: the dtype of the parameters.
      storage: of Adam's moments.
      links: what follows Adam in the chain.
    """

    label: str
    params: str = "float32"
    storage: Any = "float32"
    links: tuple[Any, ...] = ()

    def optimizer(self, learning_rate: float) -> optax.GradientTransformation:
        """Adam, and the links."""
        return adam_jax.chain(adam_jax.adam(learning_rate, storage=self.storage), *self.links)


STOCHASTIC, KAHAN = adam_jax.round_stochastically(), adam_jax.compensate()

VARIANTS = {
    "f32": Variant("f32"),
    "moments-bf16": Variant("f32, bf16 moments", storage="bfloat16"),
    "moments-8bit": Variant("f32, 8-bit moments", storage="8bit"),
    "nearest": Variant("bf16 to nearest", "bfloat16"),
    "stochastic": Variant("bf16 stochastic", "bfloat16", links=(STOCHASTIC,)),
    "kahan": Variant("bf16 compensated (Kahan)", "bfloat16", links=(KAHAN,)),
    "stochastic-8bit": Variant("bf16 stochastic, 8-bit moments", "bfloat16", "8bit", (STOCHASTIC,)),
}

*_, LAST = VARIANTS


class Result(NamedTuple):
    """What one variant came to on one task.

    Attributes:
      label: the variant's.
      size: bytes a parameter, for parameters and optimizer state.
      steps: where the points of a curve lie, (points,).
      curves: training losses on the way, (seeds, points).
      losses: at the end, over fixed examples of the training set, (seeds,).
      tests: at the end, over the test set, (seeds,): accuracy in %, or bits a character.
    """

    label: str
    size: float
    steps: np.ndarray
    curves: np.ndarray
    losses: np.ndarray
    tests: np.ndarray


# Measuring.


def measure(
    task: Task,
    data: Data,
    variants: Sequence[str],
    seeds: Sequence[int],
    directory: Path,
    tell: Callable[[str], None],
) -> Iterator[Result]:
    """A result for each variant.

    Compiles once for all seeds, and only if there is something to run.
    """
    examples = (task.training_set(data), task.judged_on(data), data.test.spread(task.judged))
    starts = [begin(task, examples[0], seed) for seed in seeds]
    for name in variants:
        variant = VARIANTS[name]
        optimizer = variant.optimizer(task.learning_rate)
        program = jax.jit(trainer(task, optimizer, variant.params)).lower(*starts[0], *examples)
        common, compiled = _digest(hashlib.sha256(program.as_text().encode()), examples), None
        records = []
        for seed, start in zip(seeds, starts, strict=True):
            path = (
                directory
                / f"{task.name}-{name}-{seed}-{_digest(common.copy(), start).hexdigest()[:16]}.json"
            )
            if not path.exists():
                compiled = compiled or program.compile()
                _write(path, _run(compiled, *start, *examples))
            records.append(json.loads(path.read_text(encoding="utf-8")))
            tell(
                f"{task.name}, {variant.label}, seed {seed}: loss {records[-1]['loss']:.4f}, "
                f"{records[-1]['seconds']:.0f} s"
            )
        size = adam_jax.state_bytes(
            optimizer, jax.eval_shape(partial(rest, dtype=variant.params), starts[0][0])
        )
        yield _result(variant.label, size.total / size.elements, task, records)


def _run(compiled: Any, *arguments: Any) -> dict[str, Any]:
    begun = time.perf_counter()
    outcome = jax.device_get(compiled(*arguments))
    return {
        **{
            field: np.asarray(value, np.float64).tolist()
            for field, value in outcome._asdict().items()
        },
        "seconds": time.perf_counter() - begun,
    }


def _result(label: str, size: float, task: Task, records: Sequence[dict[str, Any]]) -> Result:
    parts = np.array_split(np.arange(1, task.steps + 1), min(POINTS, task.steps))
    curves = [
        [np.mean([record["losses"][step - 1] for step in part]) for part in parts]
        for record in records
    ]
    tests = [
        record["test_accuracy"] * 100 if task.reads == "digits" else record["test_loss"] / np.log(2)
        for record in records
    ]
    losses = [record["loss"] for record in records]
    steps = np.array([np.mean(part) for part in parts])
    return Result(label, size, steps, *map(np.array, (curves, losses, tests)))


def _digest(digest: Any, arrays: Any) -> Any:
    for leaf in jax.tree.leaves(arrays):
        digest.update(np.ascontiguousarray(leaf))
    return digest


def _write(path: Path, record: dict[str, Any]) -> None:
    """All or nothing: a reader, or the next start, never sees half of it."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(path)


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


if __name__ == "__main__":
    main()
