"""A batch of features as the two samples that distances between distributions compare."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from kdcore.checks import check_same_width

Normalise = Literal["none", "variance"]
Positions = Literal["pool", "samples"]
Labels = Literal["true", "teacher"]


def samples(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "m ..."],
    *,
    normalise: Normalise,
    positions: Positions,
) -> tuple[Float[Tensor, "i d"], Float[Tensor, "j e"]]:
    r"""Both features as rows, in the unit in which the teacher's total variance is 1.

    .. math:: \frac{s_i}{\sqrt v}, \quad \frac{t_j}{\sqrt v}, \quad
        v = \frac1m \sum_j \|t_j - \bar t\|^2

    Every squared distance is thereby divided by v, so that one weight means the same for any width
    and scale; with ``normalise="none"``, or where the teacher's rows do not vary, v is 1. Maps and
    tokens are averaged over positions, or every position is a sample of its own.
    """
    here, there = _rows(student, positions), _rows(teacher, positions)
    if normalise == "none":
        return here, there
    variance = (there - there.mean(dim=0)).square().sum() / len(there)
    unit = torch.where(variance > 0, variance, 1.0).sqrt()
    return here / unit, there / unit


def paired_samples(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "m ..."],
    *,
    normalise: Normalise,
    positions: Positions,
) -> tuple[Float[Tensor, "i d"], Float[Tensor, "j d"]]:
    """``samples`` of one width; ValueError where theirs differ."""
    here, there = samples(student, teacher, normalise=normalise, positions=positions)
    check_same_width(here, there)
    return here, there


def per_sample(
    values: Shaped[Tensor, "b ..."], feature: Float[Tensor, "b ..."], positions: Positions
) -> Shaped[Tensor, "i ..."]:
    """What belongs to a picture (label, logits), once for each sample that its feature becomes."""
    if feature.ndim == 2 or positions == "pool":
        return values
    count = feature[0].numel() // feature.shape[1 if feature.ndim == 4 else 2]
    return values.repeat_interleave(count, dim=0)


def class_per_sample(
    label: Int[Tensor, " b"],
    teacher_logits: Float[Tensor, "b k"],
    feature: Float[Tensor, "b ..."],
    *,
    labels: Labels,
    positions: Positions,
) -> Int[Tensor, " i"]:
    """The class of each sample: its picture's label, or what the teacher takes the picture for.

    The teacher's serves where labels are missing, noisy or invented with the picture.
    """
    classes = label if labels == "true" else teacher_logits.argmax(dim=1)
    return per_sample(classes, feature, positions)


def _rows(feature: Tensor, positions: Positions) -> Tensor:
    if feature.ndim == 4:
        feature = feature.flatten(2).mT
    if feature.ndim == 3:
        return feature.mean(dim=1) if positions == "pool" else feature.flatten(0, 1)
    return feature
