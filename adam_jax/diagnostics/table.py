"""Tables: in plain columns, and as rich draws them where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Collection, Sequence
from typing import Any


def write_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()
) -> None:
    """Writes a table to stdout, after a blank line."""
    if not _draws():
        sys.stdout.write(f"\n{plain_table(heads, rows, numbers)}\n")
        return
    from rich.console import Console

    Console().print(rich_table(heads, rows, numbers))


def show_drawing(drawing: Any) -> None:
    """Writes to stdout what rich can draw, or else print."""
    if not _draws():
        sys.stdout.write(f"{drawing}\n")
        return
    from rich.console import Console

    Console().print(drawing)


def _draws() -> bool:
    """Whether tables are drawn: in a terminal, if rich is there."""
    return sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


def plain_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()
) -> str:
    """The lines of a table; columns named in `numbers` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = []
    for row in (heads, *rows):
        columns = zip(heads, row, widths, strict=True)
        lines.append(
            "  ".join(
                cell.rjust(w) if head in numbers else cell.ljust(w) for head, cell, w in columns
            ).rstrip()
        )
    return "\n".join(lines)


def rich_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()
) -> Any:
    """The same as a `rich.table.Table`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="right" if head in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: a path or a flag may look like markup
    return table
