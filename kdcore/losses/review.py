"""Losses on maps of all depths together: each of the student's also reviews the deeper ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.batch_norm import BatchNorm
from kdcore.losses.features import mean_squared_error
from kdcore.losses.maps import as_map, map_pairs
from kdcore.terms import Term, present
from kdcore.types import Batch, Outputs, Probe


def hierarchical_distance(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    r"""Mean squared difference of maps and of their averages over 4 x 4, 2 x 2 and 1 x 1 cells.

    .. math:: \frac{\mathrm{mse}(s, t) + \sum_{k=1}^{K} 2^{-k} \, \mathrm{mse}(
        \mathrm{pool}_{l_k}(s), \mathrm{pool}_{l_k}(t))}{1 + \sum_{k=1}^{K} 2^{-k}}

    with those of the sizes l = 4, 2, 1 that are smaller than the map.

    Source: Chen and others 2021 (ReviewKD), arXiv:2104.09044, section 3, with the weights of
    their code.
    """
    sizes = [size for size in (4, 2, 1) if size < min(student.shape[2:])]
    pooled = [[F.adaptive_avg_pool2d(maps, size) for maps in (student, teacher)] for size in sizes]
    errors = [mean_squared_error(*maps) for maps in ((student, teacher), *pooled)]
    weights = [0.5**k for k in range(len(errors))]
    weighted = [weight * error for weight, error in zip(weights, errors, strict=True)]
    return torch.stack(weighted).sum() / sum(weights)


class Review(Term):
    r"""Hierarchical distance of the teacher's maps and the student's, each with all deeper ones.

    .. math:: \sum_l D\big( E_l(f_l), t_l \big), \quad
        f_l = \alpha_l \odot R_l(s_l) + \beta_l \odot f_{l+1}, \quad
        (\alpha_l, \beta_l) = \sigma\big( A_l [R_l(s_l), f_{l+1}] \big)

    with D the ``hierarchical_distance``, 1x1 convolutions R and A, 3x3 convolutions E, and
    :math:`f_L = R_L(s_L)` of the deepest layer. Name the layers of all stages and the embedding:
    ``{layer1: layer1, layer2: layer2, layer3: layer3, embedding: embedding}``. The weight is right
    for a warm-up over the first 20 epochs.

    Source: Chen and others 2021 (ReviewKD), arXiv:2104.09044, section 3, with the width and the
    interpolation of their code.
    """

    def __init__(self, layers: Mapping[str, str], probe: Probe, *, max_width: int = 512) -> None:
        super().__init__()
        self.pairs = map_pairs(layers, probe)
        width = min(max_width, self.pairs[-1].student_shape[1])
        self.reduce = nn.ModuleList(
            _convolution(pair.student_shape[1], width, kernel_size=1) for pair in self.pairs
        )
        self.attend = nn.ModuleList(nn.Conv2d(2 * width, 2, kernel_size=1) for _ in self.pairs[:-1])
        self.expand = nn.ModuleList(
            _convolution(width, pair.teacher_shape[1], kernel_size=3) for pair in self.pairs
        )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Float[Tensor, ""]:
        taught = present(teacher)
        targets = [as_map(taught.features[pair.teacher]) for pair in self.pairs]
        maps = [
            reduce(as_map(student.features[pair.student]))
            for reduce, pair in zip(self.reduce, self.pairs, strict=True)
        ]
        fused = _resized(maps[-1], targets[-1])
        distances = [hierarchical_distance(self.expand[-1](fused), targets[-1])]
        for level in reversed(range(len(self.attend))):
            fused = _resized(_fused(self.attend[level], maps[level], fused), targets[level])
            distances.append(hierarchical_distance(self.expand[level](fused), targets[level]))
        return torch.stack(distances).sum()


def _convolution(in_channels: int, out_channels: int, *, kernel_size: int) -> nn.Module:
    convolution = nn.Conv2d(
        in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
    )
    nn.init.kaiming_uniform_(convolution.weight, a=1)  # as published: for no ReLU behind it
    return nn.Sequential(convolution, BatchNorm(out_channels))


def _fused(attend: nn.Module, here: Tensor, deeper: Tensor) -> Tensor:
    """Both maps, weighed at each position by how much attention each gets there."""
    # one convolution of both joined, without joining them, and the smaller while it is small
    weight, bias = cast(nn.Conv2d, attend).parameters()
    of_here = F.conv2d(here, weight[:, : here.shape[1]], bias)
    of_deeper = F.conv2d(deeper, weight[:, here.shape[1] :])
    attention = (of_here + _resized(of_deeper, here)).sigmoid()
    return here * attention[:, :1] + _resized(deeper, here) * attention[:, 1:]


def _resized(maps: Tensor, like: Tensor) -> Tensor:
    size = like.shape[2:]
    return maps if maps.shape[2:] == size else F.interpolate(maps, size, mode="nearest")
