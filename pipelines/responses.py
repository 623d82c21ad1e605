"""How a sweep's metric answers to the numbers that were swept: curves, and maps of pairs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.figures import COLOURS, CONTROL, DECADES, panels


@dataclass(frozen=True)
class Response:
    """One configuration: its swept numbers by dotted path, and the metric of each seed."""

    numbers: Mapping[str, float]
    values: Sequence[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


def response_curves(
    responses: Sequence[Response], *, metric: str, control: Sequence[float] = ()
) -> Figure | None:
    """The metric over each swept number; None where no number takes two values.

    A dot is a configuration, its bar the standard deviation over seeds, the line the mean of all
    that share the number; black is the control, with its standard deviation.
    """
    paths = [path for path in _paths(responses) if len(_values(responses, path)) > 1]
    if not paths:
        return None
    figure, axes = panels(len(paths))
    for path, axis in zip(paths, axes, strict=True):
        _curve(axis, responses, path)
        if control:
            middle, spread = statistics.fmean(control), _deviation(control)
            axis.axhline(middle, color=CONTROL, label="no distillation (control)")
            axis.axhspan(middle - spread, middle + spread, color=CONTROL, alpha=0.1, linewidth=0)
        axis.set(xlabel=path, ylabel=metric)
    if control:
        axes[0].legend(fontsize="x-small")
    return figure


def response_maps(responses: Sequence[Response], *, metric: str) -> Figure | None:
    """The mean metric over each pair of swept numbers that met in a grid; None where none did."""
    pairs = [
        pair for pair in itertools.combinations(_paths(responses), 2) if _is_grid(responses, pair)
    ]
    if not pairs:
        return None
    figure, axes = panels(len(pairs))
    for pair, axis in zip(pairs, axes, strict=True):
        _map(axis, responses, pair, metric)
    return figure


def _paths(responses: Sequence[Response]) -> list[str]:
    return sorted({path for response in responses for path in response.numbers})


def _values(responses: Sequence[Response], path: str) -> list[float]:
    return sorted({held.numbers[path] for held in responses if path in held.numbers})


def _is_grid(responses: Sequence[Response], pair: tuple[str, str]) -> bool:
    """Whether each of both numbers takes several values, and some of them more than one partner."""
    met = {tuple(held.numbers[path] for path in pair) for held in _with(responses, pair)}
    sizes = [len({point[place] for point in met}) for place in (0, 1)]
    return min(sizes, default=0) > 1 and len(met) > max(sizes)


def _with(responses: Sequence[Response], paths: Sequence[str]) -> list[Response]:
    return [held for held in responses if set(paths) <= set(held.numbers)]


def _curve(axis: Axes, responses: Sequence[Response], path: str) -> None:
    held = _with(responses, [path])
    places = [response.numbers[path] for response in held]
    means, spreads = [r.mean for r in held], [_deviation(r.values) for r in held]
    axis.errorbar(places, means, yerr=spreads, fmt="o", color=COLOURS[0], alpha=0.6, markersize=4)
    values = _values(responses, path)
    line = [statistics.fmean(r.mean for r in held if r.numbers[path] == value) for value in values]
    axis.plot(values, line, color=COLOURS[1])
    if min(values) > 0 and max(values) / min(values) > DECADES:
        axis.set_xscale("log")


def _map(axis: Axes, responses: Sequence[Response], pair: tuple[str, str], metric: str) -> None:
    across, down = (_values(_with(responses, pair), path) for path in pair)
    cells = np.full((len(down), len(across)), math.nan)
    for row, column in itertools.product(range(len(down)), range(len(across))):
        point = (across[column], down[row])
        held = [r.mean for r in responses if tuple(r.numbers.get(path) for path in pair) == point]
        if held:
            cells[row, column] = statistics.fmean(held)
    axis.imshow(cells, origin="lower", aspect="auto", cmap="cividis")
    middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
    for (row, column), value in np.ndenumerate(cells):
        if not math.isnan(value):
            shade = "black" if value > middle else "white"
            axis.text(column, row, f"{value:.3f}", ha="center", va="center", color=shade, size=7)
    axis.set(title=metric, xlabel=pair[0], ylabel=pair[1])
    axis.set_xticks(range(len(across)), [f"{value:g}" for value in across])
    axis.set_yticks(range(len(down)), [f"{value:g}" for value in down])


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
