"""Losses on the Gaussians that have the moments of a feature over the batch."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.losses.conditional import BatchReduction
from kdcore.losses.samples import (
    Labels,
    Normalise,
    Positions,
    class_per_sample,
    paired_samples,
)
from kdcore.metrics import gaussians
from kdcore.metrics.gaussians import Direction
from kdcore.metrics.moments import Covariance


def gaussian_wasserstein(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "m ..."],
    *,
    covariance: Covariance = "diagonal",
    normalise: Normalise = "variance",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance between Gaussians fitted to student and teacher features.

    .. math:: \frac1v \Big( \|\mu_S - \mu_T\|^2 + \mathrm{Tr}\big( \Sigma_S + \Sigma_T
        - 2 (\Sigma_S^{1/2} \Sigma_T \Sigma_S^{1/2})^{1/2} \big) \Big)

    Diagonal: means and standard deviations. Full: exact where there are fewer samples than
    dimensions, as in most batches. Never more than ``w2``.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, the row W2(G), which is diagonal.
    """
    rows = paired_samples(student, teacher, normalise=normalise, positions=positions)
    return gaussians.gaussian_wasserstein(*rows, covariance=covariance)


def gaussian_kl(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "m ..."],
    *,
    covariance: Covariance = "diagonal",
    direction: Direction = "forward",
    eps: float = 0.1,
    normalise: Literal["none", "width"] = "width",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Kullback-Leibler divergence between Gaussians fitted to student and teacher features.

    .. math:: \frac1d \mathrm{KL}\big( N(\mu_S, \Sigma_S + \delta I) \,\|\,
        N(\mu_T, \Sigma_T + \delta I) \big), \quad \delta = \epsilon \, \mathrm{Tr}(\Sigma_T) / d

    "reverse" exchanges them, "jeffreys" is half the sum. It has no unit but grows with the width d,
    by which ``normalise="none"`` does not divide, and in the full form with fewer samples than
    dimensions as 1 / eps.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, the row KL(G), which is diagonal and infinite
    where a unit is dead.
    """
    here, there = paired_samples(student, teacher, normalise="none", positions=positions)
    divergence = gaussians.gaussian_kl(
        here, there, covariance=covariance, direction=direction, eps=_floor(there, eps)
    )
    return divergence if normalise == "none" else divergence / here.shape[1]


def conditional_gaussian_wasserstein(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "n ..."],
    label: Int[Tensor, " n"],
    teacher_logits: Float[Tensor, "n k"],
    *,
    labels: Labels = "true",
    covariance: Covariance = "diagonal",
    shrinkage: float = 0.0,
    reduction: BatchReduction = "frequency",
    normalise: Normalise = "variance",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance between Gaussians fitted to the features of each class.

    .. math:: \frac1v \sum_c w_c \, W_2^2\big( N(\mu_{S|c}, \tilde\Sigma_{S|c}),
        N(\mu_{T|c}, \tilde\Sigma_{T|c}) \big)

    with covariances shrunk towards the one pooled over classes by the share ``shrinkage``. A class
    of one sample has the distance of its pair. ``labels`` and ``reduction`` as in ``cw2``.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, the row CW2(G): diagonal, summed, unshrunk.
    """
    rows = paired_samples(student, teacher, normalise=normalise, positions=positions)
    classes = class_per_sample(label, teacher_logits, student, labels=labels, positions=positions)
    return gaussians.class_gaussian_wasserstein(
        *rows, classes, classes, covariance=covariance, shrinkage=shrinkage, reduction=reduction
    )


def conditional_gaussian_kl(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "n ..."],
    label: Int[Tensor, " n"],
    teacher_logits: Float[Tensor, "n k"],
    *,
    labels: Labels = "true",
    covariance: Covariance = "diagonal",
    direction: Direction = "forward",
    eps: float = 0.1,
    shrinkage: float = 0.5,
    reduction: BatchReduction = "frequency",
    normalise: Literal["none", "width"] = "width",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Kullback-Leibler divergence between Gaussians fitted to the features of each class.

    .. math:: \frac1d \sum_c w_c \, \mathrm{KL}\big( N(\mu_{S|c}, \tilde\Sigma_{S|c} + \delta I)
        \,\|\, N(\mu_{T|c}, \tilde\Sigma_{T|c} + \delta I) \big)

    A class of one sample has no variance of its own, so that shrinkage towards the pooled one is
    what keeps its term from counting more than all others; ``labels`` and ``reduction`` as in
    ``cw2``, ``eps`` and ``normalise`` as in ``gaussian_kl``.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, with code that is diagonal and unreachable.
    """
    here, there = paired_samples(student, teacher, normalise="none", positions=positions)
    classes = class_per_sample(label, teacher_logits, student, labels=labels, positions=positions)
    divergence = gaussians.class_gaussian_kl(
        here,
        there,
        classes,
        classes,
        covariance=covariance,
        direction=direction,
        eps=_floor(there, eps),
        shrinkage=shrinkage,
        reduction=reduction,
    )
    return divergence if normalise == "none" else divergence / here.shape[1]


def _floor(teacher: Float[Tensor, "m d"], eps: float) -> Float[Tensor, ""]:
    """A share of the teacher's mean variance, or the share itself where it does not vary."""
    if eps <= 0:
        raise ValueError(f"eps must be positive: a dead unit has no variance; got {eps}")
    variance = (teacher - teacher.mean(dim=0)).square().mean()
    return eps * torch.where(variance > 0, variance, 1.0)
