"""Checkpoints of a run of the demo: what it goes on from, and whether it may.

They are Orbax's: written beside, then renamed, so that one is there as a whole or not at all.
`docs/scripts/train.py` does the same for many processes. Each holds the arrays of the run, its
curves, its options, a SHA-256 of all these, and one of what is not an array: Orbax refuses a file
that is cut short, but notices no flipped bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from adam_jax._cli.course import Progress


class Checkpoints:
    """Those of one run.

    Attributes:
      progress: how far the run was at the newest of them; `None` if there is none.
    """

    def __init__(self, manager: Any, options: dict[str, Any], every: int) -> None:
        self._manager, self._options, self._every = manager, options, every
        step = manager.latest_step()
        self.progress: Progress | None = (
            None if step is None else Progress(**self._read(step, {})["progress"])
        )
        self._saved = step

    def load(self, like: Any) -> Any:
        """The arrays of the newest checkpoint, with the structure and the shardings of `like`.

        Raises:
          ValueError: if they are not those that were saved.
        """
        leaves, structure = jax.tree.flatten(like)
        found = self._read(self._saved, {"arrays": ocp.args.StandardRestore(_named(leaves))})
        carried = [found["arrays"].get(str(i), leaf) for i, leaf in enumerate(leaves)]
        if found["digest"] != _digest(carried, found["options"], found["progress"]):
            raise self._damaged(self._saved, "its content is not what was saved")
        return jax.tree.unflatten(structure, carried)

    def save(self, carry: Any, progress: Progress, last: bool) -> None:
        """A checkpoint, if this is the start, the end, or so many steps after the one before.

        Training goes on meanwhile.

        At the start there is something to save already: the rate that the sweep chose.
        """
        step = progress.steps[-1]
        if not last and self._saved is not None and step - self._saved < self._every:
            return
        leaves = jax.tree.leaves(carry)
        run: dict[str, Any] = {"options": self._options, "progress": progress._asdict()}
        run["digest"] = _digest(leaves, **run)
        run["seal"] = _seal(run)
        saved = ocp.args.Composite(
            arrays=ocp.args.StandardSave(_named(leaves)), run=ocp.args.JsonSave(run)
        )
        self._manager.save(step, args=saved)
        self._saved = step

    def _read(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds, its arrays if they are wanted."""
        try:
            found = self._manager.restore(
                step, args=ocp.args.Composite(run=ocp.args.JsonRestore(), **wanted)
            )
            made, seal = found.run["options"], found.run.pop("seal")
            if seal != _seal(found.run):  # else a flipped bit would be another option
                raise ValueError("its options are not those that were saved")
        except Exception as error:  # whatever a damaged file makes of it: there are dozens of kinds
            raise self._damaged(
                step, f"{type(error).__name__}: {error}".splitlines()[0][:200]
            ) from error
        if differing := [name for name in self._options if made.get(name) != self._options[name]]:
            theirs, ours = (
                " ".join(f"--{name} {_said(its.get(name))}" for name in differing)
                for its in (made, self._options)
            )
            raise ValueError(
                f"--resume: found {self._manager.directory} made with {theirs}; this run has "
                f"{ours}. Give the options of that run, or another --checkpoint-dir"
            )
        return dict(found.run, arrays=found.get("arrays"))

    def _damaged(self, step: int | None, why: str) -> ValueError:
        where = f"{self._manager.directory}/{step}"
        return ValueError(
            f"--resume: {where} is damaged ({why}). Delete it to go on from the checkpoint before "
            "it"
        )


@contextlib.contextmanager
def checkpoints(
    directory: Path, options: dict[str, Any], every: int, resume: bool
) -> Iterator[Checkpoints]:
    """Opens the checkpoints in a directory.

    It waits at the end, until the last checkpoint is complete.

    Args:
      directory: of this run alone.
      options: what the numbers of the run follow from, by the names of the command line.
      every: the steps between two checkpoints, at least.
      resume: whether to go on from the newest; else there must be none.

    Raises:
      ValueError: if there are any and they are not to be gone on from, or those of other options,
        or damaged.
    """
    kept = ocp.CheckpointManagerOptions(max_to_keep=3, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(directory.resolve(), options=kept) as manager:
        if manager.all_steps() and not resume:
            raise ValueError(
                f"--checkpoint-dir: found checkpoints in {str(directory)!r}. Add --resume to go on "
                "from them, or choose another"
            )
        yield Checkpoints(manager, options, every)


def _named(leaves: list[Any]) -> dict[str, Any]:
    """The leaves by number.

    Orbax takes no array without elements, which the scales of no codes are.
    """
    return {str(i): leaf for i, leaf in enumerate(leaves) if leaf.size}


def _seal(run: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def _digest(leaves: list[Any], options: dict[str, Any], progress: dict[str, Any]) -> str:
    found = hashlib.sha256(json.dumps([options, progress], sort_keys=True).encode())
    for leaf in jax.device_get(leaves):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)
