"""Losses on the statistics of a map: its channels as a sample, or each channel's moments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_maps, check_same_shape


def neuron_selectivity(
    student: Float[Tensor, "b c_s h w"], teacher: Float[Tensor, "b c_t h w"]
) -> Float[Tensor, ""]:
    r"""Mean squared maximum mean discrepancy between the channels of both maps.

    .. math:: \frac1B \sum_b \Big( \overline{k(s_{bi}, s_{bi'})} + \overline{k(t_{bj}, t_{bj'})}
        - 2 \, \overline{k(s_{bi}, t_{bj})} \Big), \quad
        k(u, v) = \Big( \frac{u^\top v}{\|u\| \|v\|} \Big)^2

    Each channel is a point in the space of positions, so that channels may differ in number, height
    and width may not. It is the squared distance of the mean outer products :math:`u u^\top`.

    Source: Huang & Wang 2017 (NST), arXiv:1707.01219, with the polynomial kernel of degree 2 and
    c = 0.
    """
    check_maps(student, teacher)
    here, there = (F.normalize(maps.flatten(2), dim=2) for maps in (student, teacher))

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return (first @ second.mT).square().mean()

    return kernel(here, here) + kernel(there, there) - 2 * kernel(here, there)


def channel_moments(
    student: Float[Tensor, "b c h w"],
    teacher: Float[Tensor, "b c h w"],
    *,
    grid: int = 4,
    mean_weight: float = 3.0,
    std_weight: float = 1.0,
    eps: float = 1e-5,
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance between Gaussians fitted to blocks of each channel.

    .. math:: \frac{1}{B g^2} \sum_{bcij} \Big( w_\mu (\mu^s_{bcij} - \mu^t_{bcij})^2
        + w_\sigma (\sigma^s_{bcij} - \sigma^t_{bcij})^2 \Big), \quad
        \sigma^2 = \mathrm{var} + \epsilon

    over the g x g blocks of a map, which overlap where g does not divide it. Summed over channels,
    so that wide maps count more. Variances are divided by n - 1; a block of one position has none.

    Source: Lv and others 2024 (WKD-F), arXiv:2412.08139, with the values of their code for wrn-40-2
    to ShuffleNetV1; for resnet32x4 to resnet8x4 it has grid 1, mean weight 4 and weight 0.08.
    """
    check_same_shape(student, teacher)
    check_maps(student, teacher)
    here, there = (_block_moments(maps, grid, eps) for maps in (student, teacher))
    means, deviations = (
        (first - second).square().sum(dim=1).mean()
        for first, second in zip(here, there, strict=True)
    )
    return mean_weight * means + std_weight * deviations


def _block_moments(maps: Tensor, grid: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each block: (B, C, g, g) both."""
    centre = maps.mean(dim=(2, 3), keepdim=True)
    centred = maps - centre  # else the difference of E[x^2] and E[x]^2 loses its digits
    mean = F.adaptive_avg_pool2d(centred, grid)
    variance = F.adaptive_avg_pool2d(centred.square(), grid) - mean.square()
    height, width = (_block_sizes(size, grid, like=maps) for size in maps.shape[2:])
    count = height[:, None] * width
    unbiased = variance.clamp(min=0) * count / (count - 1).clamp(min=1)
    return mean + centre, (unbiased + eps).sqrt()


def _block_sizes(size: int, grid: int, *, like: Tensor) -> Tensor:
    """Positions of each block along one side, by the rule of adaptive pooling."""
    block = torch.arange(grid, device=like.device)
    first, last = block * size // grid, -(-(block + 1) * size // grid)
    return (last - first).to(like)
