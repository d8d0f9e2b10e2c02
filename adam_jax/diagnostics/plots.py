"""The history of a run's observations on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Okabe and Ito's palette, told apart by every kind of colour vision, but for its yellow, which is
# too light for a line.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")

STYLES = (":", "-.", "--", "-")


class Panel(NamedTuple):
    """One drawing. `level`: what a healthy run comes back to; `log`: whether the axis is."""

    title: str
    metrics: tuple[str, ...]
    log: bool = False
    level: float | None = None
    limits: tuple[float, float] | None = None


PANELS = (
    Panel("norm of the gradient", ("gradient_norm",), log=True),
    Panel("RMS of the update", ("update_rms",), log=True),
    Panel("update over parameters", ("update_ratio",), log=True),
    Panel("effective learning rate", ("learning_rate_median", "learning_rate_p99"), log=True),
    Panel("RMS of g/√ν̂", ("normalized_gradient_rms",), log=True, level=1),
    Panel("|μ̂|/√ν̂, median", ("signal_to_noise",), log=True),
    Panel("cosine of gradient and μ", ("momentum_cosine",), level=0, limits=(-1.05, 1.05)),
    Panel("share where ε is more than √ν̂", ("eps_fraction",), limits=(-0.05, 1.05)),
    Panel("share of 16-bit parameters that stay", ("stalled_fraction",), limits=(-0.05, 1.05)),
    Panel("share of codes at an end", ("saturated_fraction",), limits=(-0.05, 1.05)),
    Panel("steps skipped", ("skipped",)),
)
"""A dozen numbers, and what is drawn together."""


def plot(history: Sequence[Mapping[str, Any]], *, groups: str | Sequence[str] | None = None) -> Any:
    """Draws what `observe` saw of a run on one page: a drawing a metric, a line a group.

    Needs matplotlib.

        history = [observations(state), ...]          as often as you like: a look is drawn once
        plot(history).savefig("run.png")

    Numbers that are not finite are left out. A 0 on a logarithmic axis is a triangle at its foot.

    Args:
      history: what `observations` returned, in any order.
      groups: which to draw; `None`: "all", and each group of `by_path`.

    Returns:
      A `matplotlib.figure.Figure`, which a notebook shows.

    Raises:
      ImportError: without matplotlib.
      TypeError: if `history` is no sequence of mappings of numbers.
      ValueError: if there was no look yet, for a group that is not there, and for looks at one step
        that differ, as of two runs.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot: matplotlib is not installed; run: pip install matplotlib"
        ) from error
    looks = _looks(history)
    steps = np.array([look["step"] for look in looks])
    known = list(dict.fromkeys(name.rpartition("/")[0] for name in looks[0] if name != "step"))
    known.sort(key=lambda name: name != "all")
    chosen = known if groups is None else [groups] if isinstance(groups, str) else groups
    if (
        not isinstance(chosen, Sequence)
        or not chosen
        or any(group not in known for group in chosen)
    ):
        raise ValueError(f"plot: groups: found {groups!r}; expected one or some of {known}.")

    def course(group: str, metric: str) -> np.ndarray:
        return np.array([look.get(f"{group}/{metric}", np.nan) for look in looks])

    panels = [
        panel
        for panel in PANELS
        if any(f"{group}/{panel.metrics[0]}" in looks[0] for group in chosen)
    ]
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(
        figsize=(4 * COLUMNS, 2.6 * rows + 0.5), layout="constrained", facecolor="white"
    )
    handles: dict[str, Any] = {}
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, COLUMNS, i + 1)
        for j, group in enumerate(chosen):
            for metric, style in zip(panel.metrics, ("-", ":"), strict=False):
                values = course(group, metric)
                drawn = np.isfinite(values) & ((values > 0) | (not panel.log))
                at_foot = (values == 0) & panel.log & (style == "-")
                marker, colour = "." if len(looks) < FEW else "", COLOURS[j % len(COLOURS)]
                if at_foot.any():  # spread, so that several groups are seen
                    foot = axes.get_xaxis_transform()
                    heights = np.full(at_foot.sum(), 0.03 + 0.05 * (j % 4))
                    handles[group] = axes.plot(
                        steps[at_foot], heights, "v", color=colour, ms=3, transform=foot
                    )[0]
                if drawn.any():
                    width = (
                        3 if group == "all" and len(chosen) > 1 else 1.3
                    )  # it is often hidden by the largest group
                    handles[group] = axes.plot(
                        steps[drawn], values[drawn], style, color=colour, marker=marker, lw=width
                    )[0]
        if panel.log:
            axes.set_yscale("log")
        if panel.level is not None:
            axes.axhline(panel.level, color="0.6", lw=0.8, zorder=0)
        if panel.limits:
            axes.set_ylim(*panel.limits)
        dotted = ", dotted: _p99" if len(panel.metrics) > 1 else ""
        axes.set_title(f"{panel.metrics[0]}\n{panel.title}{dotted}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if i >= len(panels) - COLUMNS:
            axes.set_xlabel("step", fontsize=9)
    if len(chosen) > 1:
        figure.legend(
            handles.values(),
            handles,
            loc="outside lower center",
            ncols=min(len(handles), 6),
            frameon=False,
            fontsize=9,
        )
    return figure


COLUMNS = 3

FEW = 30
"""So many looks that each is marked."""


def _looks(history: Any) -> list[dict[str, float]]:
    """Each look once, by its step, in numbers of the host."""
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise TypeError(
            f"plot: found {type(history).__name__}; expected a list of what observations(state) "
            "returned."
        )
    found: dict[float, dict[str, float]] = {}
    for i, look in enumerate(history):
        if not isinstance(look, Mapping) or "step" not in look:
            names = ", ".join(map(str, list(look)[:3])) if isinstance(look, Mapping) else ""
            has = (
                f"the names {names or '(none)'}"
                if isinstance(look, Mapping)
                else type(look).__name__
            )
            raise TypeError(
                f"plot: found {has} at place {i} of the history; expected what observations(state) "
                "returned."
            )
        its = {name: _number(value, name, i) for name, value in look.items()}
        step = its["step"]
        if step in found and not all(
            np.array_equal(found[step].get(name, 0), x, equal_nan=True) for name, x in its.items()
        ):
            raise ValueError(
                f"plot: found two looks at step {step:g} that differ; expected the history of one "
                "run."
            )
        if step > 0:
            found[step] = its
    if not found:
        raise ValueError(
            "plot: found no look in the history; expected what observations(state) returned after "
            "a step."
        )
    return [found[step] for step in sorted(found)]


def _number(value: Any, name: str, place: int) -> float:
    """A scalar of a look, as a number of the host."""
    try:
        if np.ndim(value) == 0:
            return float(value)
        has = f"an array of shape {np.shape(value)}"
    except (TypeError, ValueError):
        has = repr(value)
    raise TypeError(
        f"plot: found {has} as {name!r} at place {place} of the history; expected a number. Of a "
        "mapped run take one member: jax.tree.map(lambda x: x[0], look)."
    )
