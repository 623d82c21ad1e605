"""Figures show the numbers that were measured: read back from the drawn lines."""

from __future__ import annotations

import matplotlib.colors
import numpy as np
import pytest
import torch

from kdcore.types import Classifier
from pipelines.diagnostics import Matched
from pipelines.figures import CONTROL, joint_embedding, learning_curves, risk_bounds

BOUNDS = ("student_head.gap", "student_head.gap_over_bound", "class_wasserstein_1")


def history(start: float) -> list[dict[str, float]]:
    names = ("val/top1", "val/nll", "train/loss", "train/ce", "train/top1", "lr")
    bounds = [f"bounds/{name}" for name in (*BOUNDS, "diagonal_plan_mass")]
    return [
        {"epoch": float(epoch), **dict.fromkeys((*names, *bounds), start + epoch)}
        for epoch in (1, 2, 3)
    ]


HISTORIES = {"no distillation": [history(0.0)], "kd": [history(1.0), history(3.0)]}


def test_a_curve_is_the_mean_over_seeds_and_its_band_their_reach() -> None:
    axes = learning_curves(HISTORIES, control="no distillation").axes
    shown = [axis.get_title() for axis in axes if axis.get_visible()]
    assert shown == ["val/top1", "val/nll", "train/ce", "train/loss"]
    control, kd = axes[0].get_lines()
    assert control.get_label() == "no distillation"
    assert control.get_color() == CONTROL != kd.get_color()
    np.testing.assert_array_equal(kd.get_xydata(), [[1, 3], [2, 4], [3, 5]])
    (band,) = axes[0].collections
    low, high = band.get_datalim(axes[0].transData).intervaly
    assert (low, high) == (2, 6)


def test_a_term_that_one_configuration_lacks_is_drawn_for_the_others() -> None:
    plain = [{name: v for name, v in epoch.items() if name != "train/ce"} for epoch in history(0.0)]
    figure = learning_curves({"plain": [plain], "kd": [history(1.0)]})
    drawn = {axis.get_title(): len(axis.get_lines()) for axis in figure.axes}
    assert (drawn["train/ce"], drawn["val/top1"]) == (1, 2)


def test_the_joint_embedding_places_both_networks_and_colours_classes() -> None:
    head = Classifier(torch.zeros(2, 4), torch.zeros(2))
    rows = torch.cat([torch.randn(10, 4), torch.randn(10, 4) + 20])
    label = torch.arange(20) // 10
    (axis,) = joint_embedding(Matched(rows, rows + 0.01, label, head, head)).axes
    student, teacher = (scatter.get_offsets() for scatter in axis.collections)
    assert len(student) == len(teacher) == 20
    apart = np.linalg.norm(student[:10].mean(axis=0) - student[10:].mean(axis=0))
    assert np.linalg.norm(student - teacher, axis=1).max() < apart
    colours = {matplotlib.colors.to_hex(c) for c in axis.collections[0].get_facecolors()}
    assert len(colours) == 2


def test_the_bounds_are_drawn_for_every_configuration() -> None:
    figure = risk_bounds(HISTORIES, control="no distillation")
    assert [len(axis.get_lines()) for axis in figure.axes if axis.get_visible()] == [2] * 4


@pytest.mark.parametrize("count", [8, 20])
def test_many_configurations_differ_by_more_than_colour(count: int) -> None:
    axis = learning_curves({str(i): [history(i)] for i in range(count)}).axes[0]
    styles = {(line.get_color(), line.get_linestyle()) for line in axis.get_lines()}
    assert len(styles) == count
