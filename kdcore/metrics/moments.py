"""The Gaussians that have the moments of a sample, or of each of its classes."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.metrics.classes import class_means, class_sums

Covariance = Literal["diagonal", "full"]


class Gaussians(NamedTuple):
    r"""One Gaussian, or one per class.

    ``spread`` is the variances, shape (d), of a diagonal Gaussian; of a full one it is a factor A
    of shape (r, d) with :math:`\Sigma = A^\top A`, so that nothing of size d x d has to be formed.
    """

    mean: Float[Tensor, "*c d"]
    spread: Float[Tensor, "*c ..."]


def fit(rows: Float[Tensor, "n d"], covariance: Covariance, ridge: float = 0.0) -> Gaussians:
    """The maximum-likelihood Gaussian (divided by n), with ``ridge`` added to its variances."""
    mean = rows.mean(dim=0)
    centred = rows - mean
    if covariance == "diagonal":
        return Gaussians(mean, centred.square().mean(dim=0) + ridge)
    factor = centred / math.sqrt(len(rows))
    if ridge:
        identity = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        factor = torch.cat([factor, math.sqrt(ridge) * identity])
    return Gaussians(mean, factor)


def fit_classes(
    rows: Float[Tensor, "n d"],
    index: Int[Tensor, " n"],
    num: int,
    covariance: Covariance,
    shrinkage: float,
) -> Gaussians:
    """The Gaussian of each class, its covariance shrunk towards the one pooled over classes.

    Two passes: variances about the class's own mean, without the cancellation of E[x^2] - E[x]^2.
    """
    mean = class_means(rows, index, num)
    centred = rows - mean.index_select(0, index)
    count = torch.bincount(index, minlength=num).clamp(min=1).to(rows)
    if covariance == "diagonal":
        squares = class_sums(centred.square(), index, num)
        variance = squares / count[:, None]
        if shrinkage:
            pooled = squares.sum(dim=0) / len(rows)
            variance = (1 - shrinkage) * variance + shrinkage * pooled
        return Gaussians(mean, variance)
    factors = _blocks(centred / count.sqrt().index_select(0, index)[:, None], index, num)
    if shrinkage:
        pooled = (math.sqrt(shrinkage / len(rows)) * centred).expand(num, -1, -1)
        factors = torch.cat([math.sqrt(1 - shrinkage) * factors, pooled], dim=1)
    return Gaussians(mean, factors)


def _blocks(
    rows: Float[Tensor, "n d"], index: Int[Tensor, " n"], num: int
) -> Float[Tensor, "c k d"]:
    """The rows of each class under one another, filled up with zeros to the largest class."""
    count = torch.bincount(index, minlength=num)
    order = index.argsort(stable=True)
    start = count.cumsum(0) - count
    place = torch.arange(len(rows), device=rows.device) - start[index[order]]
    blocks = rows.new_zeros(num, int(count.max()), rows.shape[1])
    return blocks.index_put((index[order], place), rows.index_select(0, order))
