"""The history of a run's observations on one page."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adam_jax.diagnostics.metrics import METRICS

# Okabe and Ito's palette, told apart by every kind of colour vision, but for its yellow, which is
# too light for a line.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")

STYLES = (":", "-.", "--", "-")


class Panel(NamedTuple):
    """One drawing.

    Attributes:
      title: what it shows.
      metrics: what is drawn together; the second one dotted.
      log: whether the axis is logarithmic.
      level: a line to compare with.
      healthy: the range of a healthy run, as docs/diagnose.md has it. It is shaded.
      limits: of the axis.
    """

    title: str
    metrics: tuple[str, ...]
    log: bool = False
    level: float | None = None
    healthy: tuple[float, float] | None = None
    limits: tuple[float, float] | None = None


FRACTIONS = (-0.05, 1.05)
BESIDE = ("loss", "learning_rate")
"""The keys that a training loop may add to an observation: `observe` does not measure them."""

PANELS = (
    Panel("as given", ("loss",)),
    Panel("as given", ("learning_rate",)),
    Panel("norm of the gradient", ("gradient_norm",), log=True),
    Panel("RMS of the update", ("update_rms",), log=True),
    Panel("update over parameters", ("update_ratio",), log=True, healthy=(1e-4, 1e-2)),
    Panel(
        "learning rate/(√ν̂ + ε)",
        ("learning_rate_median", "learning_rate_p99"),
        log=True,
    ),
    Panel("RMS of g/√ν̂", ("normalized_gradient_rms",), log=True, level=1, healthy=(0.5, 3)),
    Panel("|μ̂|/√ν̂, median", ("signal_to_noise",), log=True),
    Panel(
        "cosine of gradient and μ",
        ("momentum_cosine",),
        level=0,
        healthy=(0, 1),
        limits=(-1.05, 1.05),
    ),
    Panel("where ε is more than √ν̂", ("eps_fraction",), healthy=(0, 0.5), limits=FRACTIONS),
    # No range: it is high where parameters are rounded stochastically, and that is why they are.
    Panel("would stay if rounded to nearest", ("stalled_fraction",), limits=FRACTIONS),
    Panel("codes at an end", ("saturated_fraction",), healthy=(0, 0.01), limits=FRACTIONS),
    Panel("steps skipped", ("skipped",)),
)
"""A dozen numbers, and what is drawn together."""


def plot(history: Sequence[Mapping[str, Any]], *, groups: str | Sequence[str] | None = None) -> Any:
    """Draws what `observe` saw of a run on one page: one drawing per metric, one line per group.

    Needs matplotlib.

        history = [observations(state), ...]          as often as you like: a look is drawn once
        history.append(observations(state) | {"loss": loss, "learning_rate": rate})
        plot(history).savefig("run.png")

    The range of a healthy run is shaded, where there is one. Numbers that are not finite are left
    out. A 0 on a logarithmic axis is a triangle at its foot.

    Args:
      history: what `observations` returned, in any order. "loss", "learning_rate" and a group's
        "pattern/learning_rate", as `hyperparameters` calls them, are drawn if they are there.
      groups: which to draw; `None`: "all", and each group of `by_path`.

    Returns:
      A `matplotlib.figure.Figure`, which a notebook shows.

    Raises:
      ImportError: without matplotlib.
      TypeError: if `history` is no sequence of mappings of numbers.
      ValueError: if there was no look yet, and for a group that is not there.

    Warns:
      UserWarning: for looks at one step that differ, as of a run that went back to a checkpoint:
        the later one in the history is drawn; and for names that are not drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot: matplotlib is not installed; run: pip install matplotlib"
        ) from error
    looks = _looks(history)
    steps = np.array([look["step"] for look in looks])
    names = list(dict.fromkeys(name for look in looks for name in look))
    known = _groups(names)
    chosen = known if groups is None else [groups] if isinstance(groups, str) else groups
    if (
        not isinstance(chosen, Sequence)
        or not chosen
        or any(group not in known for group in chosen)
    ):
        raise ValueError(f"plot: groups: found {groups!r}; expected one or some of {known}.")

    def name_of(group: str, metric: str) -> str:
        own = f"{group}/{metric}"
        return metric if group == "all" and metric in BESIDE and own not in names else own

    def course(group: str, metric: str) -> np.ndarray:
        return np.array([look.get(name_of(group, metric), np.nan) for look in looks])

    panels = [
        panel
        for panel in PANELS
        if any(name_of(group, panel.metrics[0]) in names for group in chosen)
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
        _frame(axes, panel)
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

HEALTHY = "#EAF4EA"
"""A green so light that lines of every colour stand out from it."""


def _frame(axes: Any, panel: Panel) -> None:
    """The settings of a drawing, besides its lines."""
    if panel.log:
        axes.set_yscale("log")
    if panel.level is not None:
        axes.axhline(panel.level, color="0.6", lw=0.8, zorder=0)
    if panel.healthy is not None:
        axes.axhspan(*panel.healthy, color=HEALTHY, lw=0, zorder=-1)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    dotted = ", dotted: _p99" if len(panel.metrics) > 1 else ""
    axes.set_title(f"{panel.metrics[0]}\n{panel.title}{dotted}", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _groups(names: list[str]) -> list[str]:
    """The groups that were observed, "all" first. Warns of names that are not drawn."""
    apart = [(name, *name.rpartition("/")[::2]) for name in names if name != "step"]
    known = list(dict.fromkeys(group for _, group, metric in apart if metric in METRICS))
    known.sort(key=lambda name: name != "all")
    other = [
        name
        for name, group, metric in apart
        if not (metric in (*METRICS, *BESIDE) and group in known)
        and not (metric in BESIDE and group == "")
    ]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        warnings.warn(
            f"plot: found {', '.join(map(repr, other[:3]))}{more} in the history; expected what "
            "observations(state) returned, 'loss' and 'learning_rate'. Nothing else is drawn.",
            stacklevel=3,
        )
    return known


def _looks(history: Any) -> list[dict[str, float]]:
    """Each look once, by its step, in numbers of the host."""
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise TypeError(
            f"plot: found {type(history).__name__}; expected a list of what observations(state) "
            "returned."
        )
    found: dict[float, dict[str, float]] = {}
    differing: list[float] = []
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
        before = found.get(step, {})
        if any(
            name in before and not np.array_equal(before[name], x, equal_nan=True)
            for name, x in its.items()
            if name.rpartition("/")[2] in METRICS
        ):
            differing.append(step)
        if step > 0:
            found[step] = before | its
    if not found:
        raise ValueError(
            "plot: found no look in the history; expected what observations(state) returned after "
            "a step."
        )
    if differing:
        warnings.warn(
            f"plot: found two looks at step {differing[0]:g} that differ"
            f"{f', and at {len(differing) - 1} more' if len(differing) > 1 else ''}; expected the "
            "history of one run. The later one of each is drawn.",
            stacklevel=3,
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
