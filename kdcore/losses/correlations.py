"""Losses on correlations: between the samples of a batch, or the channels of a map."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_same_rows, check_same_shape
from kdcore.rows import unit_rows


def kernel_correlation(
    student: Float[Tensor, "b ..."],
    teacher: Float[Tensor, "b ..."],
    *,
    gamma: float = 0.4,
    degree: int = 2,
    normalise: Literal["unit", "none"] = "unit",
    reduction: Literal["norm", "mean_square"] = "norm",
) -> Float[Tensor, ""]:
    r"""Difference of the samples' correlations under a Gaussian kernel, expanded to a polynomial.

    .. math:: \frac1{B^2} \| K^s - K^t \|_F, \quad
        K_{ij} = e^{-2 \gamma} \sum_{p=0}^{P} \frac{(2 \gamma)^p}{p!} \langle x_i, x_j \rangle^p

    which is :math:`e^{-\gamma \|x_i - x_j\|^2}` to degree P for rows of length 1; "none" takes the
    rows as they are. "mean_square" squares the norm, as the paper does.

    Source: Peng and others 2019 (CC), arXiv:1904.01802, section 3.4, without their embeddings: the
    kernels of two widths can be compared. Norm and weight are those of the public implementation.
    """
    check_same_rows(student, teacher)
    here, there = student.flatten(1), teacher.flatten(1)
    if normalise == "unit":
        here, there = unit_rows(here), unit_rows(there)
    difference = _gaussian_kernel(here, gamma, degree) - _gaussian_kernel(there, gamma, degree)
    if reduction == "mean_square":
        return difference.square().mean()
    norm: Tensor = torch.linalg.matrix_norm(difference)
    return norm / difference.numel()


def consecutive_correlation(
    student: Float[Tensor, "b ..."], teacher: Float[Tensor, "b ..."]
) -> Float[Tensor, ""]:
    r"""Mean inner product of the absolute differences of one sample and the next.

    .. math:: \frac{1}{B - 1} \sum_{i=1}^{B-1} \langle d_i, d_{i+1} \rangle, \quad d = |s - t|

    Depends on the order of the batch, and is not the loss of the paper it is named after; a lone
    sample has no next and gives 0.

    Source: Tian, Krishnan & Isola 2020, arXiv:1910.10699, section 4, whose benchmark calls it CC;
    our projector of the student stands for its embeddings of both.
    """
    check_same_shape(student, teacher)
    apart = (student - teacher).abs().flatten(1)
    return (apart[:-1] * apart[1:]).sum() / max(len(apart) - 1, 1)


def channel_correlation(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    r"""Squared difference of the channels' inner products, each row of unit length.

    .. math:: \frac{1}{BC} \sum_b \sum_{ij} \Big(
        \frac{G^s_{bij}}{\|G^s_{bi}\|} - \frac{G^t_{bij}}{\|G^t_{bi}\|} \Big)^2, \quad
        G_{bij} = \langle x_{bi}, x_{bj} \rangle

    Raises ValueError for features that are not maps.

    Source: Liu and others 2021 (ICKD), arXiv:2202.03680, section 3.2, without the BatchNorm that
    their code puts behind the student's projector.
    """
    check_same_shape(student, teacher)
    if student.ndim != 4:
        raise ValueError(f"this loss compares maps (B, C, H, W), got {tuple(student.shape)}")
    here, there = (_channel_products(feature) for feature in (student, teacher))
    return (here - there).square().sum() / (here.shape[0] * here.shape[1])


def _gaussian_kernel(rows: Tensor, gamma: float, degree: int) -> Tensor:
    products = rows @ rows.mT
    terms = [(2 * gamma) ** p / math.factorial(p) * products.pow(p) for p in range(degree + 1)]
    return torch.stack(terms).sum(dim=0) * math.exp(-2 * gamma)


def _channel_products(feature: Tensor) -> Tensor:
    channels = feature.flatten(2)
    return F.normalize(channels @ channels.mT, dim=2)
