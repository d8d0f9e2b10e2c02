"""Scalars of a run as TensorBoard's event files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tensorboardX import SummaryWriter


@contextlib.contextmanager
def events(directory: Path, first: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Gives `log(step, scalars)`, which writes a flat dict of numbers.

    Args:
      directory: the run's folder. TensorBoard reads all files in it as one run.
      first: the step from which this run writes. What an earlier one wrote for that step and later,
        TensorBoard then drops.
    """
    with SummaryWriter(str(directory), purge_step=first) as writer:

        def log(step: int, scalars: Mapping[str, float]) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            # A run that is killed goes on from a checkpoint, and writes none of the steps before it
            # again
            writer.flush()

        yield log
