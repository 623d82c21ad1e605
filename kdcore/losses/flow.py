"""Losses on how the map of one layer goes together with that of the next."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_same_shape
from kdcore.losses.maps import Connectors
from kdcore.terms import Term
from kdcore.types import Batch, Outputs, Probe

Pool = Literal["average", "max"]
FlowReduction = Literal["mean", "sum", "column_norm"]


def flow_matrix(
    first: Float[Tensor, "b i h_i w_i"], second: Float[Tensor, "b j h_j w_j"], *, pool: Pool
) -> Float[Tensor, "b i j"]:
    r"""Mean product over positions of each channel of one map with each of another.

    .. math:: G_{ij} = \frac{1}{HW} \sum_{hw} a_{ihw} b_{jhw}

    The larger map is pooled to the smaller.
    """
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    pooled = F.adaptive_avg_pool2d if pool == "average" else F.adaptive_max_pool2d
    a, b = (
        (maps if maps.shape[2:] == size else pooled(maps, size)).flatten(2)
        for maps in (first, second)
    )
    return a @ b.mT / a.shape[2]


def flow_distance(
    student: Float[Tensor, "b i j"], teacher: Float[Tensor, "b i j"], *, reduction: FlowReduction
) -> Float[Tensor, ""]:
    r"""Difference :math:`D_b` of the matrices of both networks, averaged over the batch.

    .. math:: \frac{1}{B I J} \sum_{bij} D_{bij}^2, \quad \frac1B \sum_{bij} D_{bij}^2, \quad
        \frac1B \sum_{bj} \sqrt{\textstyle\sum_i D_{bij}^2}

    as ``reduction`` is "mean", "sum" or "column_norm".
    """
    check_same_shape(student, teacher)
    difference = student - teacher
    if reduction == "mean":
        return difference.square().mean()
    if reduction == "sum":
        return difference.square().sum(dim=(1, 2)).mean()
    norms: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return norms.sum(dim=1).mean()


class Flow(Term):
    r"""Squared difference of the products of channels between each layer and the next.

    .. math:: \sum_l \mathrm{mean} \big( G(s_l, s_{l+1}) - G(t_l, t_{l+1}) \big)^2, \quad
        G_{ij}(a, b) = \frac{1}{HW} \sum_{hw} a_{ihw} b_{jhw}

    over pairs of layers in order of depth. The products grow with the maps, so that the weight
    depends on the networks.

    Raises ValueError for less than two pairs of layers.

    Source: Yim and others 2017 (FSP), A Gift from Knowledge Distillation, equations 1 and 2. They
    take the maximum where maps differ in size, sum over channels, want equal channels, and train
    with this loss before the labels. The defaults and the weight are the public code's whose tables
    are quoted, and the channels are projected.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        probe: Probe,
        *,
        pool: Pool = "average",
        reduction: FlowReduction = "mean",
    ) -> None:
        super().__init__()
        if len(layers) < 2:
            raise ValueError(
                f"this loss compares how two layers go together; got {dict(layers)}, give at least "
                "two pairs of layers"
            )
        self.maps = Connectors(layers, probe)
        self.pool, self.reduction = pool, reduction

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Float[Tensor, ""]:
        here, there = (
            [flow_matrix(*maps, pool=self.pool) for maps in pairwise(of_network)]
            for of_network in zip(*self.maps(student, teacher), strict=True)
        )
        distances = [
            flow_distance(*matrices, reduction=self.reduction)
            for matrices in zip(here, there, strict=True)
        ]
        return torch.stack(distances).sum()
