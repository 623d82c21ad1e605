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
    if len(student) != len(teacher) or len(student) not in (2, 3, 4):
        raise ValueError(
            "two features can be compared if both are (B, D), (B, N, D) or (B, C, H, W); got "
            f"{tuple(student)} from the student and {tuple(teacher)} from the teacher"
        )
    axis = 1 if len(student) == 4 else -1
    if student[axis] == teacher[axis]:
        return nn.Identity()
    if len(student) == 4:
        return nn.Conv2d(student[1], teacher[1], kernel_size=1, bias=False)
    return nn.Linear(student[-1], teacher[-1], bias=False)


def same_resolution(
    student: Shaped[Tensor, "b ..."], teacher: Shaped[Tensor, "b ..."]
) -> tuple[Tensor, Tensor]:
    """Both maps average-pooled to the smaller height and width of the two; others as they are."""
    if student.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    height, width = map(min, student.shape[2:], teacher.shape[2:])
    size = (height, width)
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
