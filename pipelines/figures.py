"""What runs measured, as figures that print in grey and read without telling red from green."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE

from pipelines.diagnostics import Matched

# Okabe & Ito 2008, Color Universal Design; black is the control's
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
CONTROL = "#000000"
# Tol 2021, Colour Schemes, "muted" with black: ten classes before colours repeat
CLASSES = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933"),
    *("#DDCC77", "#CC6677", "#882255", "#AA4499", CONTROL),
)
EMBEDDING = "embedding.png"  # the file of a joint embedding
_LONGEST = 60  # characters of a label, so that three fit beside each other
DASHES = ("-", "--", ":", "-.")
# beyond this ratio of the greatest to the least a number is drawn on a logarithmic axis
DECADES = 20.0

History = Sequence[Mapping[str, float]]  # of one run, an epoch each


def learning_curves(histories: Mapping[str, Sequence[History]], *, control: str = "") -> Figure:
    """What is measured on the validation split and the parts of the training loss, by epoch.

    A line per configuration is the mean over its seeds, the band from the least to the greatest.
    """
    measured = {name for runs in histories.values() for run in runs for name in run[0]}
    parts = sorted(name for name in measured - {"train/top1"} if name.startswith("train/"))
    known = [name for name in ("val/top1", "val/nll") if name in measured]
    judged = known or sorted(name for name in measured if name.startswith("val/"))
    names = [*judged, *parts]
    figure, axes = panels(len(names))
    for name, axis in zip(names, axes, strict=True):
        _bands(axis, histories, name, control)
        axis.set(title=name, xlabel="epoch")
    legend_below(figure, axes[0])
    return figure


def joint_embedding(pair: Matched, *, seed: int = 0) -> Figure:
    """The embeddings of student and teacher in one plane, by t-SNE; colours are classes.

    The two must be of one width.

    Source: van der Maaten & Hinton 2008, JMLR 9.
    """
    rows = np.concatenate([pair.student.cpu().numpy(), pair.teacher.cpu().numpy()])
    perplexity = min(30.0, (len(rows) - 1) / 3)
    places = TSNE(init="pca", random_state=seed, perplexity=perplexity).fit_transform(rows)
    label, half = pair.label.cpu().numpy(), len(pair.label)
    figure, (axis,) = panels(1, size=5.0)
    for name, marker, part in (("student", "o", places[:half]), ("teacher", "^", places[half:])):
        colours = np.take(CLASSES, label % len(CLASSES))
        axis.scatter(*part.T, c=colours, marker=marker, s=14, alpha=0.6, label=name, linewidths=0)
    axis.set(title="embeddings of the same held-out pictures", xticks=[], yticks=[])
    axis.legend(fontsize="small")
    return figure


def risk_bounds(histories: Mapping[str, Sequence[History]], *, control: str = "") -> Figure:
    """Both sides of KD2M's bound for the student's classifier, epoch by epoch, on a log scale."""
    names = {
        "difference of risks": "bounds/student_head.gap",
        "difference over its bound": "bounds/student_head.gap_over_bound",
        "class-conditional W1": "bounds/class_wasserstein_1",
        "mass of the plan on its diagonal": "bounds/diagonal_plan_mass",
    }
    figure, axes = panels(len(names))
    for (title, name), axis in zip(names.items(), axes, strict=True):
        _bands(axis, histories, name, control)
        axis.set(title=title, xlabel="epoch")
    axes[0].set_yscale("log")
    legend_below(figure, axes[0])
    return figure


def _styles(labels: Mapping[str, object], control: str) -> list[tuple[str, str]]:
    """A colour and a dash per label, so that lines differ in grey too."""
    styles, taken = [], 0
    for label in labels:
        if label == control:
            styles.append((CONTROL, "-"))
            continue
        dash = DASHES[taken // len(COLOURS) % len(DASHES)]
        styles.append((COLOURS[taken % len(COLOURS)], dash))
        taken += 1
    return styles


def _bands(axis: Axes, histories: Mapping[str, Sequence[History]], name: str, control: str) -> None:
    """A line for every configuration that measured the quantity."""
    for (label, runs), style in zip(histories.items(), _styles(histories, control), strict=True):
        held = [run for run in runs if name in run[0]]
        if held:
            _band(axis, held, name, label, *style)


def _band(
    axis: Axes, runs: Sequence[History], name: str, label: str, colour: str, dash: str
) -> None:
    values = np.array([[epoch[name] for epoch in run] for run in runs])
    epochs = [epoch["epoch"] for epoch in runs[0]]
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.plot(epochs, values.mean(axis=0), color=colour, linestyle=dash, label=label)
    if len(runs) > 1:
        axis.fill_between(
            epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0
        )


def legend_below(figure: Figure, axis: Axes) -> None:
    """What the lines of an axis are, under all panels, where it covers none of them."""
    lines, labels = axis.get_legend_handles_labels()
    short = [words if len(words) <= _LONGEST else f"{words[:_LONGEST]}…" for words in labels]
    columns = len(figure.axes[:3])
    figure.legend(lines, short, loc="outside lower left", ncols=columns, fontsize="x-small")


def panels(count: int, *, size: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure of so many axes, three beside each other."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(1.25 * size * columns, size * rows), layout="constrained", dpi=120)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]
