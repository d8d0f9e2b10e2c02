"""The figure of `benchmarks.low_precision`.

How each task was learnt, and where it ended for how many bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._runs import Result

# Okabe & Ito's colours, which those who see fewer can tell apart.
COLOURS = ("black", "#56b4e9", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
MARKERS = "osDXv^P"


def draw(results: Mapping[str, Sequence[Result]], labels: Sequence[str], path: Path) -> None:
    """Draws a column of two panels for each title.

    Args:
      results: by title; the first of each is what the others are compared with.
      labels: of all results that there could be, in the order of their colours.
      path: where to, a .png or .svg.
    """
    from matplotlib.figure import Figure

    looks = {
        label: {"color": colour, "marker": marker}
        for label, colour, marker in zip(labels, COLOURS, MARKERS, strict=True)
    }
    columns = max(len(results), 2)
    figure = Figure((3 * columns, 6.2), dpi=200, layout="constrained", facecolor="white")
    axes = figure.subplots(2, len(results), squeeze=False, height_ratios=(6, 5))
    for (above, below), (title, found) in zip(axes.T, results.items(), strict=True):
        below.sharey(axes[1, 0])
        above.set_title(title, fontsize=10)
        _draw_curves(above, found, looks)
        _draw_ends(below, found, looks)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    low, high = axes[1, 0].get_ylim()
    axes[1, 0].set_yticks((-1, 0, 1, 10, 100), ("−1", "0", "1", "10", "100"))
    axes[1, 0].set_ylim(min(low, -1.5), max(high, 15))
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("loss at the end − f32's,\nin standard deviations of f32's")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=columns + columns // 3,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path)


def _draw_curves(
    panel: Any, results: Sequence[Result], looks: Mapping[str, dict[str, str]]
) -> None:
    for i, result in enumerate(results):
        mean, deviation = result.curves.mean(0), _deviation(result.curves)
        # The first is drawn broad, so that those which lie on it are seen on it; the markers take
        # turns.
        size = (
            {"linewidth": 4, "markersize": 0}
            if i == 0
            else {"linewidth": 1, "markersize": 4, "markevery": (i, len(results))}
        )
        band = (mean - deviation, mean + deviation)
        panel.fill_between(
            result.steps, *band, color=looks[result.label]["color"], alpha=0.1, linewidth=0
        )
        panel.plot(result.steps, mean, label=result.label, **looks[result.label], **size)
    # Leaves out the fall of the first steps. It is the same for all, and nothing else would be seen
    # beside it.
    reference = results[0].curves.mean(0)
    top = reference[len(reference) // 10]
    if reference[-1] < top / 100:  # a run to convergence: on a linear axis all of them end at 0
        panel.set_yscale("log")
        panel.set_ylim(reference[-1] / 3, top)
    panel.set_ylim(top=top)
    panel.set_xlim(left=0)
    panel.set_xlabel("step")


def _draw_ends(panel: Any, results: Sequence[Result], looks: Mapping[str, dict[str, str]]) -> None:
    """In units of what the seed alone does to the first.

    On a scale that is linear within one of them and logarithmic beyond.
    """
    reference = results[0].losses
    unit = _deviation(reference) or 1.0
    panel.axhspan(-1, 1, color="black", alpha=0.08, linewidth=0)
    for i, result in enumerate(results):
        difference = (result.losses - reference) / unit
        bar, size = (
            (_deviation(difference), {"markersize": 6})
            if i
            else (None, {"markersize": 11, "markerfacecolor": "none"})
        )
        panel.errorbar(
            result.size,
            difference.mean(),
            bar,
            capsize=3,
            elinewidth=1,
            **looks[result.label],
            **size,
        )
    panel.set_yscale("symlog", linthresh=1)
    panel.set_xlim(3, 13)
    panel.set_xticks((4, 6, 8, 10, 12))
    panel.set_xlabel("bytes per parameter")


def _deviation(values: np.ndarray) -> Any:
    """Over the seeds; of a single one, 0."""
    return values.std(0, ddof=min(1, len(values) - 1))
