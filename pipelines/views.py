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

from pipelines.config import AugmentConfig

VERSION = 1  # of the mapping from numbers to pixels; part of every cache's fingerprint
STREAMS = {"crop": 0, "flip": 1, "order": 2, "split": 3}  # one number per use, never used again

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Tensor, key: Tensor | Sequence[int]) -> Tensor:
    """Philox4x32-10: four 32-bit words per counter.

    counter is (..., 4) and key (2,), words in [0, 2^32) held as int64; the result is (..., 4).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = (int(word) for word in key)
    for _ in range(10):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # int64 wraps modulo 2^64; the mask undoes the sign that the shift drags along
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK


def random_words(sample: Tensor, *, view: int, stream: str, seed: int) -> Tensor:
    """Four words in [0, 2^32) for each sample number: (B,) to (B, 4), int64."""
    counter = torch.stack(
        [
            sample & _MASK,
            (sample >> 32) & _MASK,
            torch.full_like(sample, view),
            torch.full_like(sample, STREAMS[stream]),
        ],
        dim=-1,
    )
    return philox(counter, (seed & _MASK, (seed >> 32) & _MASK))


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
