"""What both benchmarks print.

Tables made once, shown by `rich` on a terminal and as markdown everywhere else.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import jax

NOT_INSTALLED = "not installed"


class Table(NamedTuple):
    """A table of text.

    Attributes:
      title: what is measured, in which unit.
      columns: the heads.
      rows: as many cells each as there are heads.
      note: what a reader has to know to read it right.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def installed(package: str) -> bool:
    """Whether a package could be imported, without the cost of importing it."""
    return importlib.util.find_spec(package) is not None


def machine() -> str:
    """One line: processor, cores, JAX's device, and the versions that the numbers belong to."""
    packages = [
        f"{name} {_version(name)}" for name in ("adam_jax", "jax", "optax", "torch", "numpy")
    ]
    device = f"JAX on {jax.devices()[0].device_kind}"
    return " · ".join(
        [
            _processor(),
            f"{_cores()} cores",
            device,
            f"Python {platform.python_version()}",
            *packages,
        ]
    )


def show(tables: Sequence[Table], output: Path | None = None) -> None:
    """Prints the tables below the machine's line.

    And writes them as markdown to `output`, if given.
    """
    heading = machine()
    text = "\n\n".join([heading, *map(markdown, tables)]) + "\n"
    if output is not None:
        output.write_text(text, encoding="utf-8")
    if sys.stdout.isatty() and installed("rich"):
        _show_rich(heading, tables)
    else:
        print(text)


def markdown(table: Table) -> str:
    """A table as GitHub's markdown, its columns aligned for those who read the source."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    cells = (
        [cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    )
    head, *body = (f"| {' | '.join(line)} |" for line in cells)
    parts = [f"**{table.title}**", "\n".join([head, rule, *body])]
    return "\n\n".join([*parts, table.note] if table.note else parts)


def _show_rich(heading: str, tables: Sequence[Table]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    console.print(heading, style="dim", highlight=False)
    for table in tables:
        rendered = RichTable(
            title=table.title,
            caption=table.note or None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        for column in table.columns:
            rendered.add_column(column, justify="right")
        for row in table.rows:
            rendered.add_row(*row)
        console.print(rendered)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def _cores() -> int:
    # A container may be allowed fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
