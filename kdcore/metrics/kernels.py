"""Distances between two samples by means of a kernel or of distances, without a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_same_width
from kdcore.metrics.distances import distances, squared_distances


def squared_mean_distance(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    r"""Squared distance of the means: MMD with a linear kernel, the least of the distances here.

    .. math:: \| \mu_S - \mu_T \|^2
    """
    check_same_width(student, teacher)
    return (student.mean(dim=0) - teacher.mean(dim=0)).square().sum()


def gaussian_mmd(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    *,
    bandwidth: float | Literal["mean", "median"],
    scales: Sequence[float] = (1.0,),
    unbiased: bool = False,
) -> Float[Tensor, ""]:
    r"""Squared maximum mean discrepancy with a Gaussian kernel, averaged over bandwidths.

    .. math:: \overline{k(s, s')} + \overline{k(t, t')} - 2 \, \overline{k(s, t)}, \quad
        k(u, v) = \frac1{|A|} \sum_{a \in A} \exp\Big( -\frac{\|u - v\|^2}{2 (a \sigma)^2} \Big)

    with A the ``scales``. "mean" is the published bandwidth, the mean of all n^2 + m^2 + n m
    distances, zeros of the diagonals included; "median" that of the distances between different
    rows of both together. Both are held constant. The unbiased form leaves each row's kernel with
    itself out, may be negative, and needs two rows of each: with one it keeps them.

    Source: Gretton et al. 2012, JMLR 13, equations 3 and 5.
    """
    check_same_width(student, teacher)
    centre = teacher.mean(dim=0)  # of no effect but on rounding
    here, there = student - centre, teacher - centre
    inner = _within(here), _within(there)
    between = squared_distances(here, there)
    sigma = _bandwidth(*inner, between, bandwidth)

    def kernel(squared: Tensor) -> Tensor:
        exponent = -squared / (2 * sigma**2)
        return torch.stack([(exponent / scale**2).exp() for scale in scales]).mean(dim=0)

    of_student, of_teacher = (_mean(kernel(squared), unbiased) for squared in inner)
    return of_student + of_teacher - 2 * kernel(between).mean()


def polynomial_mmd(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    *,
    degree: int = 2,
    offset: float = 0.0,
) -> Float[Tensor, ""]:
    r"""Squared maximum mean discrepancy with a polynomial kernel on rows of unit length.

    .. math:: \overline{k(s, s')} + \overline{k(t, t')} - 2 \, \overline{k(s, t)}, \quad
        k(u, v) = \Big( \frac{u^\top v}{\|u\| \|v\|} + c \Big)^p

    Source: Huang & Wang 2017 (NST), arXiv:1707.01219, with p = 2 and c = 0.
    """
    check_same_width(student, teacher)
    here, there = F.normalize(student, dim=1), F.normalize(teacher, dim=1)

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return (first @ second.mT + offset).pow(degree).mean()

    return kernel(here, here) + kernel(there, there) - 2 * kernel(here, there)


def energy_distance(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    r"""Twice the mean distance between the samples less the mean distances within each.

    .. math:: 2 \, \overline{\|s - t\|} - \overline{\|s - s'\|} - \overline{\|t - t'\|}

    Zero only between equal samples, and has no bandwidth.

    Source: Szekely & Rizzo 2013, Energy statistics.
    """
    check_same_width(student, teacher)
    within = distances(student, student).mean() + distances(teacher, teacher).mean()
    return 2 * distances(student, teacher).mean() - within


def mean_bandwidth(
    of_student: Float[Tensor, "n n"],
    of_teacher: Float[Tensor, "m m"],
    between: Float[Tensor, "n m"],
) -> Float[Tensor, ""]:
    """The mean of all distances, zeros of the diagonals included, as in the published KD2M."""
    parts = (of_student.detach(), of_teacher.detach(), between.detach())
    total = torch.stack([part.sum() for part in parts]).sum()
    return total / sum(part.numel() for part in parts)


def _within(rows: Tensor) -> Tensor:
    return squared_distances(rows, rows).fill_diagonal_(0)


def _bandwidth(
    of_student: Tensor, of_teacher: Tensor, between: Tensor, rule: float | Literal["mean", "median"]
) -> Tensor:
    """From squared distances."""
    if rule == "mean":
        parts = (of_student, of_teacher, between)
        sigma = mean_bandwidth(*(part.detach().sqrt() for part in parts))
    elif rule == "median":
        sigma = torch.cat([*map(_above_diagonal, (of_student, of_teacher)), between.flatten()])
        sigma = sigma.detach().median().sqrt()
    else:
        sigma = between.new_full((), rule)
    return torch.where(sigma > 0, sigma, 1.0)  # equal rows everywhere: any bandwidth will do


def _above_diagonal(matrix: Tensor) -> Tensor:
    row, column = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
    return matrix[row, column]


def _mean(gram: Tensor, unbiased: bool) -> Tensor:
    n = len(gram)
    if not unbiased or n == 1:
        return gram.mean()
    return (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))
