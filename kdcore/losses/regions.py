"""A loss on what each network would say of the regions of a picture."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.losses.decoupled import decoupled_divergences
from kdcore.losses.logits import divergences
from kdcore.types import Classifier


def regional_kd(
    student: Float[Tensor, "b c_s h w"],
    teacher: Float[Tensor, "b c_t h w"],
    label: Int[Tensor, " b"],
    student_classifier: Classifier | None,
    teacher_classifier: Classifier | None,
    *,
    grids: tuple[int, ...] = (1, 2, 4),
    contrary_weight: float = 2.0,
    divergence: Literal["kd", "dkd"] = "kd",
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Float[Tensor, ""]:
    r"""``kd`` or ``dkd`` between the logits of every region, mean over regions and samples.

    .. math:: \frac{T^2}{BR} \sum_{br} w_{br} \, D\big( t_{br} / T \,\|\, s_{br} / T \big), \quad
        s_{br} = A_s \bar F_{br} + a_s

    The map F must be the one whose mean over positions the classifier (A, a) reads, of either
    network; its means over the cells of each grid are what the classifier reads here. w is
    ``contrary_weight`` where the teacher is right about the region and wrong about the picture, or
    the other way round, and 1 elsewhere. ``alpha`` and ``beta`` concern "dkd" only.

    Raises ValueError where a classifier is missing or does not fit its map.

    Source: Wei and others 2024 (SDD), arXiv:2403.13512, section 3. Their "dkd" is the sum over
    regions and samples; ours is the mean, as their "kd" is.
    """
    here = regional_logits(student, student_classifier, grids=grids, network="student")
    there = regional_logits(teacher, teacher_classifier, grids=grids, network="teacher")
    of_picture = regional_logits(teacher, teacher_classifier, grids=(1,), network="teacher")
    contrary = _is_right(there, label) != _is_right(of_picture, label)
    weight = torch.where(contrary, contrary_weight, 1.0).to(here.dtype).flatten()
    rows = here.flatten(0, 1) / temperature, there.flatten(0, 1) / temperature
    if divergence == "dkd":
        labels = label.repeat_interleave(here.shape[1])
        values = decoupled_divergences(*rows, labels, alpha=alpha, beta=beta)
    else:
        values = divergences(*rows)
    return (weight * values).mean() * temperature**2


def regional_logits(
    feature: Float[Tensor, "b c h w"],
    classifier: Classifier | None,
    *,
    grids: tuple[int, ...],
    network: str,
) -> Float[Tensor, "b r k"]:
    """What a classifier says of the mean of a map over each cell of each grid, row by row."""
    if classifier is None:
        raise ValueError(f"this loss needs the {network}'s classifier, its outputs carry none")
    width = classifier.weight.shape[1]
    if feature.ndim != 4 or feature.shape[1] != width:
        raise ValueError(
            f"the {network}'s classifier reads {width} channels and the layer has shape "
            f"{tuple(feature.shape)}; name the last map, whose mean the classifier reads"
        )
    cells = [F.adaptive_avg_pool2d(feature, grid).flatten(2).mT for grid in grids]
    return F.linear(torch.cat(cells, dim=1), classifier.weight, classifier.bias)


def _is_right(logits: Tensor, label: Tensor) -> Tensor:
    return logits.argmax(dim=2) == label[:, None]
