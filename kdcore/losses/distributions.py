"""Losses on the distribution of a feature over the batch."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from kdcore.metrics.transport import squared_wasserstein


def wasserstein(
    student: Float[Tensor, "n ..."], teacher: Float[Tensor, "m ..."]
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance between the batch of student and of teacher features.

    .. math:: \min_{\gamma \in \Gamma(1/n, 1/m)} \sum_{ij} \gamma_{ij} \|s_i - t_j\|^2

    Maps and tokens are averaged over positions first. Over the same pictures it is at most the
    mean squared distance of the pairs, and equals it once every student feature is nearest its own
    teacher's; between unpaired batches it is biased upwards by the variance, so do not use it so.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, the row W2(E).
    """
    return squared_wasserstein(_one_row_each(student), _one_row_each(teacher))


def _one_row_each(feature: Float[Tensor, "n ..."]) -> Float[Tensor, "n d"]:
    if feature.ndim == 4:
        return feature.mean(dim=(2, 3))
    return feature.mean(dim=1) if feature.ndim == 3 else feature
