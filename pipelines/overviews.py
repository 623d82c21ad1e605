"""All configurations of a sweep in one figure: over every value, and over what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FormatStrFormatter, MaxNLocator, NullFormatter

from pipelines.figures import COLOURS, CONTROL, DECADES, legend_below, panels
from pipelines.ranking import Ranked, RankedTeacher

# what a cost is called on its axis, and how many of its units are one of the axis's
_COSTS = {
    "parameters": ("parameters", 1.0),
    "flops": ("floating-point operations per picture", 1.0),
    "latency_s": ("latency per picture in ms", 1e-3),
}


def parallel_coordinates(rows: Sequence[Ranked], *, metric: str) -> Figure | None:
    """A line per configuration over all that was swept, coloured by its mean; black is the control.

    Words stand in the order of the alphabet, numbers on a linear axis from the least to the
    greatest. None where nothing takes two values.
    """
    swept = [path for path in _paths(rows) if len(_distinct(rows, path)) > 1]
    if not swept:
        return None
    figure = Figure(figsize=(2.2 * (len(swept) + 1) + 1, 4.0), layout="constrained", dpi=120)
    axis = figure.subplots()
    scale = Normalize(min(row.mean for row in rows), max(row.mean for row in rows))
    columns = [_heights(rows, path) for path in swept]
    columns.append(_scaled([row.mean for row in rows]))
    # the best last, on top of the others
    for row, heights in reversed(list(zip(rows, zip(*columns, strict=True), strict=True))):
        colour = CONTROL if row.control else colormaps["cividis"](scale(row.mean))
        axis.plot(range(len(columns)), heights, color=colour, marker="o", markersize=4, alpha=0.8)
    for place, path in enumerate(swept):
        _ticks(axis, place, rows, path)
    axis.set_xticks(range(len(columns)), [*swept, metric])
    axis.set(yticks=[], ylim=(-0.06, 1.06), xlim=(-0.2, len(swept) + 0.3))
    figure.colorbar(ScalarMappable(scale, "cividis"), ax=axis, label=f"mean {metric}")
    return figure


def over_costs(rows: Sequence[Ranked], teachers: Sequence[RankedTeacher], *, metric: str) -> Figure:
    """The mean metric over parameters, operations and latency; a star is a teacher."""
    figure, axes = panels(len(_COSTS))
    for (name, (words, unit)), axis in zip(_COSTS.items(), axes, strict=True):
        students = [row for row in rows if not row.control]
        controls = [row for row in rows if row.control]
        for label, held, colour in (
            ("student", students, COLOURS[0]),
            ("no distillation (control)", controls, CONTROL),
        ):
            places = [getattr(row.cost, name) / unit for row in held]
            axis.plot(places, [row.mean for row in held], "o", color=colour, alpha=0.6, label=label)
        known = [teacher for teacher in teachers if metric in teacher.metrics]
        places = [getattr(teacher.cost, name) / unit for teacher in known]
        heights = [teacher.metrics[metric] for teacher in known]
        axis.plot(places, heights, "*", color=COLOURS[1], markersize=11, label="teacher")
        axis.set(xlabel=words, ylabel=metric)
        _scale(axis, [getattr(one.cost, name) / unit for one in (*rows, *known)])
    legend_below(figure, axes[0])
    return figure


def _scale(axis: Axes, places: Sequence[float]) -> None:
    """Logarithmic where the costs are that far apart; thousands and millions by their letters."""
    if max(places) > DECADES * min(places):
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(4))
    large = max(places) >= 1000
    axis.xaxis.set_major_formatter(EngFormatter(sep="") if large else FormatStrFormatter("%.3g"))


def _paths(rows: Sequence[Ranked]) -> list[str]:
    return sorted({path for row in rows for path in row.changes} - {"seed"})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _distinct(rows: Sequence[Ranked], path: str) -> list[Any]:
    """The values of a path: sorted numbers where all are, else sorted words."""
    values = [row.changes[path] for row in rows if path in row.changes]
    if all(_is_number(value) for value in values):
        return sorted({float(value) for value in values})
    return sorted({str(value) for value in values})


def _places(rows: Sequence[Ranked], path: str) -> Mapping[Any, float]:
    """Where on its axis, from 0 to 1, a value stands."""
    known = _distinct(rows, path)
    numbers = [value for value in known if _is_number(value)]
    return dict(zip(known, _scaled(numbers or list(range(len(known)))), strict=True))


def _heights(rows: Sequence[Ranked], path: str) -> list[float]:
    """NaN, which interrupts the line, for a configuration that has no such value."""
    places = _places(rows, path)
    is_number = all(_is_number(value) for value in places)
    return [
        places[float(row.changes[path]) if is_number else str(row.changes[path])]
        if path in row.changes
        else float("nan")
        for row in rows
    ]


def _scaled(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [0.5 if high == low else (value - low) / (high - low) for value in values]


def _ticks(axis: Axes, place: int, rows: Sequence[Ranked], path: str) -> None:
    """The values beside their axis, at most some eight of them."""
    axis.axvline(place, color="0.7", linewidth=0.8, zorder=0)
    known = list(_places(rows, path).items())
    shown = np.unique(np.linspace(0, len(known) - 1, 8).round().astype(int))
    for value, height in (known[number] for number in shown):
        words = f"{value:g}" if _is_number(value) else str(value)
        axis.annotate(
            words[:24],
            (place, height),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            size=7,
            parse_math=False,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )
