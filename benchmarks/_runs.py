"""The runs of `benchmarks.low_precision`: what is trained, and what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import adam_jax
from benchmarks._data import Data
from benchmarks._training import Task, begin, rest, trainer

SEEDS = (0, 1, 2, 3, 4)


POINTS = 60
"""Of a loss curve: each is the mean over several batches."""


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
