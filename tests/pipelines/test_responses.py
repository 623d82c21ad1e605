"""A sweep's metric over the numbers that were swept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipelines.responses import Response, response_curves, response_maps

STEPS, BRANCHES = "losses.it.params.steps", "student.branches.count"
GRID = [
    Response({STEPS: steps, BRANCHES: branches}, [steps + branches - 1, steps + branches + 1])
    for steps, branches in itertools.product((2.0, 4.0, 64.0), (2.0, 8.0))
]


def test_a_curve_is_the_mean_of_all_that_share_the_number() -> None:
    figure = response_curves(GRID, metric="val/top1", control=[1.0, 3.0])
    assert figure is not None
    steps, branches = figure.axes[:2]
    assert [axis.get_xlabel() for axis in (steps, branches)] == [STEPS, BRANCHES]
    assert (steps.get_xscale(), branches.get_xscale()) == ("log", "linear")
    line = next(line for line in steps.lines if len(line.get_xdata()) == 3 and line.get_ls() == "-")
    np.testing.assert_allclose(line.get_xydata(), [(2, 7), (4, 9), (64, 69)])
    (control,) = [line for line in steps.lines if line.get_label().startswith("no distillation")]
    np.testing.assert_allclose(control.get_ydata(), [2, 2])


def test_a_map_has_the_mean_of_every_pair() -> None:
    figure = response_maps(GRID, metric="val/top1")
    assert figure is not None
    (image,) = figure.axes[0].images
    np.testing.assert_allclose(image.get_array(), [[4, 6, 66], [10, 12, 72]])
    assert figure.axes[0].get_ylabel() == BRANCHES


@pytest.mark.parametrize(
    "responses",
    [
        [],
        [Response({}, [1.0])],
        [Response({STEPS: 2.0}, [1.0]), Response({STEPS: 2.0, BRANCHES: 1.0}, [2.0])],
    ],
)
def test_nothing_is_drawn_where_no_number_was_swept(responses: list[Response]) -> None:
    assert response_curves(responses, metric="val/top1") is None
    assert response_maps(responses, metric="val/top1") is None


def test_numbers_that_only_move_together_make_no_map() -> None:
    along = [Response({STEPS: value, BRANCHES: value}, [value]) for value in (2.0, 4.0, 8.0)]
    assert response_maps(along, metric="val/top1") is None
    assert response_curves(along, metric="val/top1") is not None
