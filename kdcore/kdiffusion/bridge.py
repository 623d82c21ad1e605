"""From the outputs of the branches to the teacher's channels, both standardised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from kdcore.projectors import same_resolution
from kdcore.rows import gather_rows

_EPS = 1e-5  # BatchNorm's


class Moments(NamedTuple):
    """Of each channel, over the rows and positions of all workers' batch."""

    mean: Float[Tensor, " c"]
    variance: Float[Tensor, " c"]

    def standardise(self, x: Float[Tensor, "b c p"]) -> Float[Tensor, "b c p"]:
        return (x - self.mean[:, None]) * (self.variance[:, None] + _EPS).rsqrt()

    def restore(self, x: Float[Tensor, "b c p"]) -> Float[Tensor, "b c p"]:
        """The inverse of ``standardise``."""
        return x * (self.variance[:, None] + _EPS).sqrt() + self.mean[:, None]


class Bridged(NamedTuple):
    """Estimates of the teacher's standardised feature, and that feature."""

    estimates: Float[Tensor, "branches b c p"]
    clean: Float[Tensor, "b c p"]
    variance: Float[Tensor, " c"]  # of the estimates, over branches, rows and positions
    teacher: Moments  # with which ``clean`` was standardised
    is_map: bool


def moments(x: Float[Tensor, "b c p"]) -> Moments:
    """Mean and biased variance of each channel over all workers, with gradient."""
    variance, mean = torch.var_mean(x, dim=(0, 2), correction=0)
    workers = gather_rows(torch.stack([mean, variance])[None])
    means, variances = workers.unbind(1)
    return Moments(means.mean(0), variances.mean(0) + means.var(0, correction=0))


class Bridge(nn.Module):
    """A linear map of the student's channels to the teacher's, standardised, with a learned gain.

    The branches pass it stacked as rows, so that all are standardised alike. The statistics are
    always those of the batch, over all workers: the bridge is dropped after training, so there is
    nothing to keep running ones for, and it remains a function. There is no offset because the
    teacher's standardised feature has none. Maps of two sizes are first averaged to the smaller.

    ``student`` is the shape of the outputs of branches, (B, branches, ...), or of a plain layer,
    which is one branch; ``teacher`` is (B, D), (B, N, D) or (B, C, H, W).

    Raises ValueError where these are not of one kind.

    Source: 1x1 convolution and BatchNorm, after a summary of Yao and others 2024 that calls the
    bridge "relatively weak"; the paper's own is not public.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        self._stacked = len(student) == len(teacher) + 1
        if len(teacher) not in (2, 3, 4) or not (self._stacked or len(student) == len(teacher)):
            raise ValueError(
                "branches (B, branches, ...) or a plain layer (B, ...) can be compared with a "
                "teacher's (B, D), (B, N, D) or (B, C, H, W) of the same kind; got "
                f"{tuple(student)} from the student and {tuple(teacher)} from the teacher"
            )
        self.num_branches = student[1] if self._stacked else 1
        self.width = teacher[_channel_axis(len(teacher))]
        width = student[_channel_axis(len(teacher)) + self._stacked]
        self.projector = nn.Conv1d(width, self.width, kernel_size=1, bias=False)
        self.gain = nn.Parameter(torch.ones(self.width))

    def forward(
        self, student: Shaped[Tensor, "b ..."], teacher: Shaped[Tensor, "b ..."]
    ) -> Bridged:
        flat, target = same_resolution(student.flatten(1, 2) if self._stacked else student, teacher)
        rows = flat.reshape(len(flat) * self.num_branches, -1, *flat.shape[2:])
        projected, clean = self.projector(_by_position(rows)), _by_position(target)
        _check_positions(projected, clean)
        here, there = moments(projected), moments(clean)
        estimates = self.gain[:, None] * here.standardise(projected)
        return Bridged(
            estimates.reshape(len(flat), self.num_branches, *clean.shape[1:]).transpose(0, 1),
            there.standardise(clean),
            self.gain.square() * here.variance / (here.variance + _EPS),
            there,
            teacher.ndim == 4,
        )


def _channel_axis(ndim: int) -> int:
    """Tokens have their channels last, vectors and maps second."""
    return 2 if ndim == 3 else 1


def _by_position(feature: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "b c p"]:
    """Vectors have one position, tokens keep theirs, maps lay theirs out in a row."""
    if feature.ndim == 3:
        return feature.transpose(1, 2)
    return feature.flatten(2) if feature.ndim == 4 else feature[..., None]


def _check_positions(student: Tensor, teacher: Tensor) -> None:
    if student.shape[2] != teacher.shape[2]:
        raise ValueError(
            f"student and teacher must have equally many tokens, got {student.shape[2]} and "
            f"{teacher.shape[2]}; compare layers of equal length, or maps"
        )
