"""Residual blocks that change the resolution of maps by powers of two."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.batch_norm import BatchNorm

Resample = Literal["keep", "halve", "double"]


class ResidualBlock(nn.Module):
    """conv - BN - ReLU - conv - BN beside a shortcut, then ReLU; BN is over all workers' rows.

    The shortcut is a 1x1 convolution wherever channels or resolution change. "double" repeats
    pixels before both.
    """

    def __init__(self, in_channels: int, out_channels: int, *, resample: Resample = "keep") -> None:
        super().__init__()
        stride = 2 if resample == "halve" else 1
        self._doubles = resample == "double"
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = BatchNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(out_channels)
        plain = resample == "keep" and in_channels == out_channels
        self.shortcut = (
            nn.Identity() if plain else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        # the shortcut is of single pixels, so it may as well come before they are repeated
        beside = self.shortcut(x)
        if self._doubles:
            x, beside = _doubled(x), _doubled(beside)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + beside)


def stages(in_channels: int, width: int, *, factor: int, resample: Resample) -> nn.Sequential:
    """Two blocks for every doubling or halving by ``factor``, and two blocks for a factor of 1.

    Raises ValueError for a factor that is no power of two.
    """
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"resolutions must differ by a power of two, got a factor of {factor}")
    steps: list[Resample] = [resample] * (factor.bit_length() - 1) or ["keep"]
    blocks = []
    for number, step in enumerate(steps):
        channels = width if number else in_channels
        blocks += [ResidualBlock(channels, width, resample=step), ResidualBlock(width, width)]
    return nn.Sequential(*blocks)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
