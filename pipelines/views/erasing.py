"""A box of noise, or of one grey level, in some pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipelines.augment import EraseConfig
from pipelines.views.boxes import ATTEMPTS, drawn_boxes
from pipelines.views.draws import Draws, happens

BYTES_PER_BLOCK = 16  # four words of 32 bits


def erase(image: Tensor, draws: Draws, config: EraseConfig) -> Tensor:
    """A random box of some pictures filled; one for which no box fits stays."""
    rows = happens(draws.first["erase"][:, 0], config.probability).nonzero().squeeze(1)
    height, width = image.shape[2:]
    words = draws.more("erase", ATTEMPTS, rows=rows)
    inside = drawn_boxes(words, (height, width), config, fallback=(0, 0)).contain(height, width)
    some = image[rows]
    filled = torch.where(inside[:, None], _fill(some, draws, rows, config), some)
    return image.index_copy(0, rows, filled)


def _fill(image: Tensor, draws: Draws, rows: Tensor, config: EraseConfig) -> Tensor:
    if config.fill != "noise":
        return image.new_full((), config.fill)
    count = math.prod(image.shape[1:])
    words = draws.more("erase", -(-count // BYTES_PER_BLOCK), rows=rows, first=1 + ATTEMPTS)
    noise = words.int().view(torch.uint8)  # the low byte of a word first
    return noise[:, :count].reshape(image.shape)
