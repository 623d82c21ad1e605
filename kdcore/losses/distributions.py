"""Losses on the distribution of a feature over the batch."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kdcore.metrics.transport import squared_wasserstein


def wasserstein(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "m ..."],
    *,
    normalise: Literal["none", "variance"] = "variance",
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance between the batch of student and of teacher features.

    .. math:: \frac1v \min_{\gamma \in \Gamma(1/n, 1/m)} \sum_{ij} \gamma_{ij} \|s_i - t_j\|^2

    With ``normalise="variance"``, v is the total variance of the teacher's rows, so that one weight
    means the same for any width and scale; with ``"none"``, or where they do not vary, v is 1.
    Maps and tokens are averaged over positions first. Over the same pictures it is at most the
    mean squared distance of the pairs, and equals it once every student feature is nearest its own
    teacher's; between unpaired batches it is biased upwards by the variance, so do not use it so.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, the row W2(E), which has v = 1.
    """
    rows, target = _one_row_each(student), _one_row_each(teacher)
    distance = squared_wasserstein(rows, target)
    return distance if normalise == "none" else distance / _total_variance(target)


def _total_variance(rows: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    variance = rows.var(dim=0, correction=0).sum()
    return torch.where(variance > 0, variance, 1.0)


def _one_row_each(feature: Float[Tensor, "n ..."]) -> Float[Tensor, "n d"]:
    if feature.ndim == 4:
        return feature.mean(dim=(2, 3))
    return feature.mean(dim=1) if feature.ndim == 3 else feature
