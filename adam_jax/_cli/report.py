"""What `python -m adam_jax` shows: progress while it trains, then a table and a figure."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from adam_jax._cli.course import GOAL, Course
from adam_jax.diagnostics.plots import COLOURS, STYLES
from adam_jax.diagnostics.table import write_table


@contextlib.contextmanager
def progress(names: list[str], total: int) -> Iterator[Callable[[str, str, int], None]]:
    """Gives `tell(name, doing, done)`.

    A bar for each name in a terminal, a line for each thing done elsewhere.
    """
    if not sys.stdout.isatty():
        told = set()

        def tell_plainly(name: str, doing: str, done: int) -> None:
            if (name, doing) not in told:
                told.add((name, doing))
                sys.stdout.write(f"{name}: {doing}\n")
                sys.stdout.flush()

        yield tell_plainly
        return

    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[name]}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, TextColumn("{task.description}"), console=Console()) as bars:
        tasks = {name: bars.add_task("", total=total, name=name, start=False) for name in names}

        def tell(name: str, doing: str, done: int) -> None:
            bars.start_task(tasks[name])
            bars.update(tasks[name], description="" if done == total else doing, completed=done)

        yield tell


def show(courses: dict[str, Course], swept: bool) -> None:
    """Writes the table, and what its columns mean."""
    heads = (
        "optimizer",
        "best rate" if swept else "rate",
        "training loss",
        "test accuracy",
        f"steps to {GOAL:.0%}",
        "seconds",
    )
    write_table(heads, [_row(name, course) for name, course in courses.items()], numbers=heads[1:])
    sys.stdout.write("\n")
    sys.stdout.write("\n".join(_notes(courses, swept)) + "\n")


def _row(name: str, course: Course) -> tuple[str, ...]:
    finite = math.isfinite(course.loss)
    return (
        name,
        f"{course.rate:g}{'*' if course.edge else ''}",
        f"{course.loss:#.3g}" if finite else "diverged",
        f"{course.accuracy:.1%}",
        "-" if course.steps_to_goal is None else str(course.steps_to_goal),
        f"{course.seconds:.2f}",
    )


def _notes(courses: dict[str, Course], swept: bool) -> list[str]:
    notes = ["Seconds are those of the training steps alone, without compiling and evaluating."]
    if swept:
        notes.append(
            "The rate was chosen by the loss on training images held out for that, never by test "
            "images."
        )
    edges = [f"{name} ({course.edge})" for name, course in courses.items() if course.edge]
    if edges:
        notes.append(
            f"* At the edge of the sweep, so a better rate may lie beyond: {', '.join(edges)}."
        )
    return notes


def draw(courses: dict[str, Course], path: Path, subtitle: str) -> None:
    """Writes the figure: training loss and test accuracy against steps."""
    rows = math.ceil(len(courses) / 4)
    height = 4.6 + 0.25 * rows
    figure = Figure(figsize=(10, height), dpi=150)
    loss, accuracy = figure.subplots(1, 2)
    for i, (name, course) in enumerate(courses.items()):
        look = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": STYLES[i % len(STYLES)],
            "linewidth": 1.8,
        }
        loss.plot(course.steps, course.losses, label=f"{name}, rate {course.rate:g}", **look)
        accuracy.plot(course.steps, [100 * found for found in course.accuracies], **look)
    accuracy.axhline(100 * GOAL, color="0.4", linewidth=1)
    accuracy.annotate(
        f"{GOAL:.0%}",
        (0.01, 100 * GOAL),
        xycoords=("axes fraction", "data"),
        va="bottom",
        color="0.4",
    )
    # Where all end well, what tells them apart happens near the top.
    lowest = 60 if min(course.accuracy for course in courses.values()) > 0.8 else 0
    loss.set(yscale="log", title="Training loss", ylabel="cross-entropy (nats)")
    accuracy.set(title="Test accuracy", ylabel="correct (%)", ylim=(lowest, 100.5))
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    for axes in (loss, accuracy):
        axes.set_xlabel("training steps")
        axes.set_xlim(left=0)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"One network, one start, one order of the batches: {subtitle}", fontsize=11)
    figure.legend(loc="lower center", ncols=min(len(courses), 4), frameon=False, handlelength=3)
    figure.tight_layout(rect=(0, 0.03 + 0.25 * rows / height, 1, 1))
    figure.savefig(path)
