"""The report of a finished sweep: one HTML page that needs nothing but itself, and its figures."""

from __future__ import annotations

import base64
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from pipelines.figures import COLOURS, EMBEDDING, learning_curves, risk_bounds
from pipelines.loading import as_yaml
from pipelines.overviews import over_costs, parallel_coordinates
from pipelines.ranking import Ranked, Ranking, compared, histories, read_ranking
from pipelines.responses import Response, response_curves, response_maps
from pipelines.samples import last_grids

REPORT, SAMPLES = "report.html", "samples.png"

_CURVES_SHOWN = len(COLOURS)  # configurations beside the control: as many as there are colours
_FIGURE_WIDTH, _TINY = 1100, 400  # pixels, on a screen


@dataclass(frozen=True)
class _Text:
    """What stands around a figure."""

    title: str
    alt: str
    caption: str


_TEXTS = {
    "responses": _Text(
        "Over each swept number",
        "One panel for each swept number: the metric against it.",
        "A dot is a configuration, its bar the standard deviation over seeds, the line the mean of "
        "all that share the number; black is the control.",
    ),
    "pairs": _Text(
        "Over pairs of swept numbers",
        "One map for each pair of swept numbers: the mean metric in every cell.",
        "The mean metric of all configurations in a cell.",
    ),
    "parallel": _Text(
        "All configurations",
        "Parallel coordinates: a line for each configuration through its swept values to its mean.",
        "A line is a configuration, coloured by its mean; black is the control. A gap is a value "
        "that the configuration does not have.",
    ),
    "costs": _Text(
        "Over cost",
        "Three panels: the mean metric against parameters, operations and latency.",
        "A dot is a configuration's student as it is used, black the control, a star a teacher. "
        "The table above has the numbers.",
    ),
    "curves": _Text(
        "Learning curves",
        "What is measured on the validation split and the parts of the training loss, by epoch.",
        f"The best {_CURVES_SHOWN} configurations and the control: the mean over seeds, the band "
        "from the least to the greatest.",
    ),
    "bounds": _Text(
        "How far matched features bound the difference of risks",
        "Both sides of the bound, the distance per class and the mass on the diagonal, by epoch.",
        "KD2M's theorem 3.1 for the student's classifier, on held-out pictures.",
    ),
    "embedding": _Text(
        "The best student and its teacher in one plane",
        "Embeddings of both networks for the same pictures, by t-SNE.",
        "Circles are the student's embeddings, triangles the teacher's; colours are classes.",
    ),
    "samples": _Text(
        "What the best student learned from",
        "A grid of pictures that were invented from the teacher's weights.",
        "Pictures that its run invented last: it saw no others.",
    ),
}


def write_report(folder: Path) -> list[Path]:
    """Write a finished sweep's page and figures beside its ``ranking.json``; the page comes first.

    Nothing is read but that file, the results of the runs that it names and the pictures of the
    embeddings and of invented samples, if there are any.
    """
    ranking = read_ranking(folder)
    paths: list[Path] = []
    for name, figure in _figures(ranking, folder).items():
        paths.append(folder / f"{name}.png")
        # without the library's version, which would be another file for the same numbers
        figure.savefig(paths[-1], metadata={"Software": None})
    if (folder / EMBEDDING).is_file():
        paths.append(folder / EMBEDDING)
    paths += _sampled(ranking, folder)
    page = folder / REPORT
    page.write_text(_rendered(ranking, paths))
    return [page, *paths]


def _sampled(ranking: Ranking, folder: Path) -> list[Path]:
    """The last pictures that the best student's run invented, if it did, copied beside the page."""
    # the run lies where the sweep's folder does, from wherever the two are read
    run = folder.parents[1] / Path(ranking.best.weights).parent.name
    return [Path(shutil.copyfile(file, folder / SAMPLES)) for file in last_grids(run)]


def _figures(ranking: Ranking, folder: Path) -> dict[str, Figure]:
    rows, metric = ranking.rows, ranking.metric
    control = next((row for row in rows if row.control), None)
    responses = [Response(row.numbers, row.values) for row in rows if not row.control]
    name = control.label if control else ""
    shown = {row.label: held for row in _shown(rows) if (held := histories(row, folder))}
    measured = {
        label: runs
        for label, runs in shown.items()
        if all("bounds/student_head.gap" in run[0] for run in runs)
    }
    drawn = {
        "responses": response_curves(
            responses, metric=metric, control=control.values if control else ()
        ),
        "pairs": response_maps(responses, metric=metric),
        "parallel": parallel_coordinates(rows, metric=metric),
        "costs": over_costs(rows, ranking.teachers, metric=metric),
        "curves": learning_curves(shown, control=name) if shown else None,
        "bounds": risk_bounds(measured, control=name) if measured else None,
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _shown(rows: Sequence[Ranked]) -> list[Ranked]:
    """The best configurations and all controls."""
    students = [row for row in rows if not row.control][:_CURVES_SHOWN]
    return [row for row in rows if row.control or row in students]


def _rendered(ranking: Ranking, paths: list[Path]) -> str:
    environment = Environment(
        loader=PackageLoader("pipelines"),
        autoescape=True,  # labels are the user's words
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "signed": lambda value: f"{value:+.4f}",
        "count": lambda value: f"{value:,}",
        "milliseconds": lambda value: f"{value:.3g}",
        "words": _words,
    }
    return environment.get_template("report.html").render(
        ranking=ranking,
        rows=list(zip(ranking.rows, compared(ranking.rows), strict=True)),
        has_control=any(row.control for row in ranking.rows),
        drawings=[_drawing(path) for path in paths],
        configuration=as_yaml(ranking.made.sweep),
    )


def _drawing(path: Path) -> dict[str, Any]:
    text, png = _TEXTS[path.stem], path.read_bytes()
    return {
        "name": path.stem,
        "title": text.title,
        "alt": text.alt,
        "caption": text.caption,
        "width": _shown_width(int.from_bytes(png[16:20])),  # where a PNG has its own
        "png": base64.b64encode(png).decode(),
    }


def _shown_width(pixels: int) -> int:
    """A figure's own width or the screen's; tiny pictures are blown up to whole multiples."""
    return min(pixels * max(1, _TINY // pixels), _FIGURE_WIDTH)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _words(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{path}={value}" for path, value in changes.items()) or "the base"
