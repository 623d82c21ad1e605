"""From the student's shape to the teacher's, so that two features can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, nn


def projector(student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
    """A linear map from the student's channels to the teacher's, or the identity where they agree.

    Shapes are (B, D), tokens (B, N, D) or maps (B, C, H, W); a map gets a 1x1 convolution.

    Raises ValueError where the two have different numbers of dimensions.
    """
    axis = _channel_axis(student, teacher)
    return nn.Identity() if student[axis] == teacher[axis] else regressor(student, teacher)


def regressor(student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
    """A ``projector`` that is learned also where the channels agree."""
    axis = _channel_axis(student, teacher)
    if axis == 1:
        return nn.Conv2d(student[axis], teacher[axis], kernel_size=1, bias=False)
    return nn.Linear(student[axis], teacher[axis], bias=False)


def same_resolution(
    student: Shaped[Tensor, "b ..."], teacher: Shaped[Tensor, "b ..."]
) -> tuple[Tensor, Tensor]:
    """Both maps average-pooled to the smaller height and width of the two; others as they are."""
    if {student.ndim, teacher.ndim} != {4} or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    height, width = map(min, student.shape[2:], teacher.shape[2:])
    size = (height, width)
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


def _channel_axis(student: Sequence[int], teacher: Sequence[int]) -> int:
    if len(student) != len(teacher) or len(student) not in (2, 3, 4):
        raise ValueError(
            "two features can be compared if both are (B, D), (B, N, D) or (B, C, H, W); got "
            f"{tuple(student)} from the student and {tuple(teacher)} from the teacher"
        )
    return 1 if len(student) == 4 else -1
