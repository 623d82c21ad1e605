"""Losses on how the samples of a batch lie to each other: any two widths can be compared."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_same_rows
from kdcore.metrics.distances import distances


def relational_kd(
    student: Float[Tensor, "b ..."],
    teacher: Float[Tensor, "b ..."],
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Float[Tensor, ""]:
    r"""Huber differences of all distances between two samples and of all angles between three.

    .. math:: w_d \, \mathcal L_D + w_a \, \mathcal L_A

    with ``distance_relation`` and ``angle_relation``.

    Source: Park and others 2019 (RKD), arXiv:1904.05068, section 3.2.3; the weights are 25 and 50.
    """
    return distance_weight * distance_relation(student, teacher) + angle_weight * angle_relation(
        student, teacher
    )


def distance_relation(
    student: Float[Tensor, "b ..."], teacher: Float[Tensor, "b ..."]
) -> Float[Tensor, ""]:
    r"""Huber difference of all distances between samples, in units of their mean.

    .. math:: \frac1{B^2} \sum_{ij} h\big( d^s_{ij} - d^t_{ij} \big), \quad
        d_{ij} = \frac{\|x_i - x_j\|}{\overline{\|x_k - x_l\|}}

    with h the Huber loss that is quadratic below 1, and the mean over k other than l.

    Source: Park and others 2019 (RKD-D), arXiv:1904.05068, equations 5 to 7.
    """
    check_same_rows(student, teacher)
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def angle_relation(
    student: Float[Tensor, "b ..."], teacher: Float[Tensor, "b ..."]
) -> Float[Tensor, ""]:
    r"""Huber difference of the cosines of all angles that three samples make.

    .. math:: \frac1{B^3} \sum_{ijk} h\big( \psi^s_{ijk} - \psi^t_{ijk} \big), \quad
        \psi_{ijk} = \langle e_{ij}, e_{ik} \rangle, \quad
        e_{ij} = \frac{x_j - x_i}{\|x_j - x_i\|}

    with e zero between equal samples. Costs :math:`B^3`, as its memory does.

    Source: Park and others 2019 (RKD-A), arXiv:1904.05068, equations 8 to 10.
    """
    check_same_rows(student, teacher)
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def similarity_divergence(
    student: Float[Tensor, "b ..."],
    teacher: Float[Tensor, "b ..."],
    *,
    eps: float = 1e-7,
    reduction: Literal["mean", "batchmean"] = "mean",
) -> Float[Tensor, ""]:
    r"""Divergence between the distributions of each sample's similarities to all others.

    .. math:: \frac1{B^2} \sum_{ij} p_{ij} \log \frac{p_{ij} + \epsilon}{q_{ij} + \epsilon}, \quad
        p_{ij} = \frac{k^t_{ij}}{\sum_l k^t_{il}}, \quad k_{ij} = \tfrac12 (1 + \cos(x_i, x_j))

    with q the student's. "batchmean" divides by B, as a mean of divergences does.

    Source: Passalis & Tefas 2018 (PKT), arXiv:1803.10837, equation 10, with the mean over all pairs
    of their code.
    """
    check_same_rows(student, teacher)
    q, p = _similarity_shares(student, eps), _similarity_shares(teacher, eps)
    terms = p * ((p + eps) / (q + eps)).log()
    return terms.mean() if reduction == "mean" else terms.sum() / len(terms)


def similarity_preservation(
    student: Float[Tensor, "b ..."],
    teacher: Float[Tensor, "b ..."],
    *,
    row_norm: Literal["l2", "l1"] = "l2",
) -> Float[Tensor, ""]:
    r"""Mean squared difference of the samples' inner products, each row of unit length.

    .. math:: \frac1{B^2} \sum_{ij} \Big( \frac{G^s_{ij}}{\|G^s_i\|}
        - \frac{G^t_{ij}}{\|G^t_i\|} \Big)^2, \quad G_{ij} = \langle x_i, x_j \rangle

    Source: Tung & Mori 2019 (SP), arXiv:1907.09682, equations 1 to 4. "l1" divides
    rows by their sum of absolute values, as one of the public implementations does.
    """
    check_same_rows(student, teacher)
    order = 2 if row_norm == "l2" else 1
    here, there = (F.normalize(_inner_products(rows), p=order) for rows in (student, teacher))
    return (here - there).square().mean()


def _relative_distances(feature: Tensor) -> Tensor:
    between = distances(feature.flatten(1), feature.flatten(1))
    mean = between.sum() / max(len(between) * (len(between) - 1), 1)
    return between / torch.where(mean > 0, mean, 1.0)


def _cosines(feature: Tensor) -> Tensor:
    rows = feature.flatten(1)
    apart = rows - rows[:, None]
    squared = apart.square().sum(dim=2, keepdim=True)
    # not normalize(): its slope between equal samples is 1e12
    direction = apart / torch.where(squared > 0, squared, 1.0).sqrt()
    return direction @ direction.mT


def _similarity_shares(feature: Tensor, eps: float) -> Tensor:
    rows = feature.flatten(1)
    rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + eps)
    kernel = (rows @ rows.mT + 1) / 2
    shares: Tensor = kernel / kernel.sum(dim=1, keepdim=True)
    return shares


def _inner_products(feature: Tensor) -> Tensor:
    rows = feature.flatten(1)
    return rows @ rows.mT
