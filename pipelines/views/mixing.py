"""Pictures made of two: how much of each, and their pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.augment import AugmentConfig, CutmixConfig, MixupConfig
from pipelines.views.boxes import Boxes
from pipelines.views.draws import draws_of, happens, scaled
from pipelines.views.fixed_point import SHARE_BITS, SHARES, beta_limits, root_shares


@dataclass(frozen=True, slots=True)
class Mixture:
    """How much of itself each picture keeps, and where the other one shows alone.

    A picture has either a level below SHARES, or a box, or neither.
    """

    level: Tensor  # (B,) of SHARES
    box: Boxes
    share: Tensor  # (B,) float32 in [0, 1], exactly what the pixels have


def mixture(
    sample: Tensor, number: int, *, size: tuple[int, int], augment: AugmentConfig, seed: int
) -> Mixture:
    """Mixup's share or cutmix's box of each sample in a view; where both are drawn, the box."""
    draws = draws_of(sample, number, seed=seed, streams=("mixup", "cutmix"))
    height, width = size
    level = _level(draws.first["mixup"], augment.mixup)
    kept = _level(draws.first["cutmix"], augment.cutmix)
    box = _box(draws.first["cutmix"], kept, height, width)
    covered = box.height * box.width
    level = torch.where(kept < SHARES, SHARES, level)
    shown = level * (height * width - covered)
    return Mixture(level, box, (shown.double() / (SHARES * height * width)).float())


def mixed(image: Tensor, other: Tensor, how: Mixture) -> Tensor:
    """Each picture with its partner: uint8 (B, C, H, W) twice to the same."""
    height, width = image.shape[2:]
    if bool((how.level < SHARES).any()):
        image = _blended(image, other, how.level)
    return torch.where(how.box.contain(height, width)[:, None], other, image)


def _blended(image: Tensor, other: Tensor, level: Tensor) -> Tensor:
    beside = other.int()
    total = (image.int() - beside).mul_(level.int()[:, None, None, None])
    total = total.add_(beside, alpha=SHARES).add_(SHARES // 2).bitwise_right_shift_(SHARE_BITS)
    return total.to(torch.uint8)


def _level(words: Tensor, config: MixupConfig | CutmixConfig | None) -> Tensor:
    """The share that a picture keeps, of SHARES: all of it where nothing happens."""
    whole = torch.full_like(words[:, 0], SHARES)
    if config is None:
        return whole
    limits = beta_limits(config.alpha).to(words.device)
    drawn = torch.bucketize(words[:, 1].contiguous(), limits, right=True)
    return torch.where(happens(words[:, 0], config.probability), drawn, whole)


def _box(words: Tensor, kept: Tensor, height: int, width: int) -> Boxes:
    """As high and wide as the square root of what is not kept, about a centre; cut at the border.

    Source: Yun and others 2019, arXiv:1905.04899, equation 2, with the rounding of their code.
    """
    top, high = _side(words[:, 2], kept, height)
    left, wide = _side(words[:, 3], kept, width)
    return Boxes(top, left, high, wide)


def _side(word: Tensor, kept: Tensor, size: int) -> tuple[Tensor, Tensor]:
    half = root_shares(size).to(word.device)[SHARES - kept] // 2
    centre = scaled(word, size)
    start, end = (centre - half).clamp(min=0), (centre + half).clamp(max=size)
    return start, end - start
