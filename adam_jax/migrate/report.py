"""What `convert_state` returns: the new state, and what became of each moment."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from adam_jax._core.configuration import StageInstance, of_group
from adam_jax._core.errors import some
from adam_jax._core.leaves import PyTree


class Entry(NamedTuple):
    """A moment, or something else that a state keeps.

    Attributes:
      place: where it is, as `jax.tree_util.keystr` writes it: in the old state for what is dropped,
        else in the new one.
      what: what it is.
      note: what became of it, or why.
    """

    place: str
    what: str
    note: str = ""


class Converted(NamedTuple):
    """What `convert_state` returns. Prints as a table of all but the state.

    Attributes:
      state: the state of the new configuration.
      kept: what both configurations have.
      fresh: what only the new one has, and starts as in a new run.
      dropped: what only the old one had.
    """

    state: PyTree
    kept: tuple[Entry, ...]
    fresh: tuple[Entry, ...]
    dropped: tuple[Entry, ...]

    def __str__(self) -> str:
        rows = [
            (group, *entry)
            for group in ("kept", "fresh", "dropped")
            for entry in getattr(self, group)
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = [
            [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
            for row in rows
        ]
        return "\n".join("  ".join(line).rstrip() for line in lines)


class Report(NamedTuple):
    """The entries of one stage, or of several.

    Attributes:
      kept: see `Converted`.
      fresh: see `Converted`.
      misfits: what the old configuration had in another form.
    """

    kept: tuple[Entry, ...] = ()
    fresh: tuple[Entry, ...] = ()
    misfits: tuple[Entry, ...] = ()

    def __or__(self, other: Report) -> Report:
        return Report(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def entry_of(stage: StageInstance, field: str, what: str = "", note: str = "") -> Entry:
    """Returns the entry of a field of a stage's state."""
    name = f"{field or 'the state'} of {stage.key[0]}{of_group(stage.group)}"
    place = f"{stage.place}.{field}" if field else stage.place
    return Entry(place, what or stage.meanings.get(field) or name, note)


def if_not_all(concerned: Iterable[str], leaves: Collection[str]) -> str:
    """Returns a note on the leaves that are concerned; an empty one if all are."""
    found = list(concerned)
    return f"of {some(found)}" if len(found) < len(leaves) else ""
