"""Boxes of random area and shape within a picture."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.augment import BoxConfig
from pipelines.views.draws import scaled
from pipelines.views.fixed_point import BITS, LEVELS, root_levels, root_ratios

ATTEMPTS = 10  # to draw a box that fits, as in torchvision and in the published codes


class Boxes(NamedTuple):
    """One box for each picture: its upper left corner and its size in pixels, (B,) int64 each."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor

    def contain(self, height: int, width: int) -> Tensor:
        """Which pixels of pictures of this size lie inside: (B, H, W)."""
        row = torch.arange(height, device=self.top.device) - self.top[:, None]
        column = torch.arange(width, device=self.top.device) - self.left[:, None]
        rows = (row >= 0) & (row < self.height[:, None])
        columns = (column >= 0) & (column < self.width[:, None])
        return rows[:, :, None] & columns[:, None, :]


def drawn_boxes(
    words: Tensor, size: tuple[int, int], config: BoxConfig, *, fallback: tuple[int, int]
) -> Boxes:
    """The first of ATTEMPTS boxes that fits, from four words each; else one of the fallback's size.

    Area uniform and the logarithm of width to height uniform, in LEVELS steps each.
    """
    height, width = size
    area, ratio, down, right = words.unflatten(1, (ATTEMPTS, 4)).unbind(2)
    root_area = root_levels(*config.area).to(words.device)[scaled(area, LEVELS)]
    root_ratio = root_ratios(*config.ratio).to(words.device)[scaled(ratio, LEVELS)]
    side = root_area * math.isqrt(height * width << 2 * BITS) >> BITS
    high, wide = _rounded((side << BITS) // root_ratio), _rounded(side * root_ratio >> BITS)
    fits = (high > 0) & (high <= height) & (wide > 0) & (wide <= width)
    first = fits.long().argmax(dim=1, keepdim=True)  # argmax gives the first of several
    found = fits.any(dim=1)
    high = torch.where(found, high.gather(1, first).squeeze(1), fallback[0])
    wide = torch.where(found, wide.gather(1, first).squeeze(1), fallback[1])
    top = scaled(down.gather(1, first).squeeze(1), height - high + 1)
    left = scaled(right.gather(1, first).squeeze(1), width - wide + 1)
    return Boxes(top, left, high, wide)


def _rounded(length: Tensor) -> Tensor:
    return (length + (1 << (BITS - 1))) >> BITS
