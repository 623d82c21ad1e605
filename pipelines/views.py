"""Replayable augmentation: a view is a pure function of (sample, view number, seed).

Random numbers come from a counter, not from a state: Philox4x32-10 of (sample, view, stream), one
stream per operation. So a view is the same in any batch, process, machine and year, and a new
operation never shifts the numbers of another. Pixels are moved, never computed, as integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.philox import WORD, philox
from pipelines.config import AugmentConfig

VERSION = 1  # of the mapping from numbers to pixels; part of every cache's fingerprint
# one number per use, never used again
STREAMS = {"crop": 0, "flip": 1, "order": 2, "split": 3, "classes": 20}


def random_words(sample: Tensor, *, view: int, stream: str, seed: int) -> Tensor:
    """Four words in [0, 2^32) for each sample number: (B,) to (B, 4), int64."""
    counter = torch.stack(
        [
            sample & WORD,
            (sample >> 32) & WORD,
            torch.full_like(sample, view),
            torch.full_like(sample, STREAMS[stream]),
        ],
        dim=-1,
    )
    return philox(counter, (seed & WORD, (seed >> 32) & WORD))


def permutation(count: int, *, seed: int, epoch: int, stream: str) -> Tensor:
    """The numbers 0 to count - 1 in an order drawn from (seed, epoch)."""
    words = random_words(torch.arange(count), view=epoch, stream=stream, seed=seed)
    return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)


def view(
    image: Tensor, sample: Tensor, number: int, *, augment: AugmentConfig, seed: int
) -> Tensor:
    """The pictures as view ``number`` shows them: uint8 (B, C, H, W) to the same.

    View 0 is the picture itself.
    """
    if number == 0 or augment == AugmentConfig():
        return image
    _, _, height, width = image.shape
    rows = torch.arange(height, device=image.device).expand(len(image), -1)
    columns = torch.arange(width, device=image.device).expand(len(image), -1)
    if augment.flip:
        words = random_words(sample, view=number, stream="flip", seed=seed)
        flipped = (words[:, :1] & 1).bool()
        columns = torch.where(flipped, columns.flip(1), columns)
    if augment.crop:
        words = random_words(sample, view=number, stream="crop", seed=seed)
        offset = (words[:, :2] * (2 * augment.crop + 1)) >> 32
        rows, columns = rows + offset[:, :1], columns + offset[:, 1:]
        image = F.pad(image, [augment.crop] * 4)
    one = torch.arange(len(image), device=image.device)[:, None, None]
    moved = image.movedim(1, -1)[one, rows[:, :, None], columns[:, None, :]]
    return moved.movedim(-1, 1).contiguous()


def normalised(image: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, C, H, W) to float32: (image / 255 - mean) / std, for each channel or for all.

    Raises ValueError for as many means as fit neither; torch would make grey pictures colour ones.
    """
    if {len(mean), len(std)} - {1, image.shape[1]}:
        raise ValueError(
            f"data.mean and data.std need one number or one per channel ({image.shape[1]}), got "
            f"{tuple(mean)} and {tuple(std)}"
        )
    scale = 1 / (255 * torch.tensor(std, device=image.device))
    shift = -torch.tensor(mean, device=image.device) / torch.tensor(std, device=image.device)
    return image.float() * scale[:, None, None] + shift[:, None, None]
