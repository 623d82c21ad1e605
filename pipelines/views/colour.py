"""Changing colours, in integers: grey is luma, factors have 16 bits after the point."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.augment import JitterConfig
from pipelines.views.draws import Draws, happens, scaled
from pipelines.views.fixed_point import BITS, ONE, fixed

# The shares of red, green and blue in grey, of 2^16. Source: ITU-R BT.601, as in Pillow's "L".
LUMA = (19595, 38470, 7471)
SECTORS = 6  # of the circle of hues: between two of red, yellow, green, cyan, blue, magenta
FULL = 255


def jitter(image: Tensor, draws: Draws, config: JitterConfig) -> Tensor:
    """Brightness, contrast, saturation and hue of some pictures, in this order."""
    chosen = happens(draws.first["jitter"][:, 0], config.probability).nonzero().squeeze(1)
    words = draws.first["jitter"][chosen]
    some = brightness(image[chosen], _factor(words[:, 1], config.brightness))
    some = contrast(some, _factor(words[:, 2], config.contrast))
    some = saturation(some, _factor(words[:, 3], config.saturation))
    if config.hue:
        word = draws.more("jitter", 1, rows=chosen)[:, 0]
        some = hue(some, _between(word, -fixed(config.hue), fixed(config.hue)))
    return image.index_copy(0, chosen, some)


def brightness(image: Tensor, factor: Tensor) -> Tensor:
    """Towards black for a factor below 1, away from it above; factors in 2^-16."""
    return blend(image, image.new_zeros(()), factor)


def contrast(image: Tensor, factor: Tensor) -> Tensor:
    """Towards the mean grey of the picture, or away from it."""
    shade = grey(image).flatten(1)
    count = shade.shape[1]
    mean = (shade.sum(dim=1, dtype=torch.int64) + count // 2) // count
    return blend(image, mean.to(torch.uint8)[:, None, None, None], factor)


def saturation(image: Tensor, factor: Tensor) -> Tensor:
    """Towards the grey of each pixel, or away from it; grey pictures stay as they are."""
    return image if image.shape[1] == 1 else blend(image, grey(image), factor)


def hue(image: Tensor, turn: Tensor) -> Tensor:
    """Colours turned by a share of the circle of hues, in 2^-16; grey pictures stay as they are.

    A colour is its largest and its smallest channel and one between: turning moves the third along
    the sectors of the circle, and leaves the two.

    Source: Smith 1978, Color gamut transform pairs, the hexcone model.
    """
    if image.shape[1] == 1:
        return image
    red, green, blue = image.int().unbind(1)
    high, low = image.amax(dim=1).int(), image.amin(dim=1).int()
    is_red, is_green, chroma = high == red, high == green, high - low
    past = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    start = (~is_red).int() * 4 * ONE - (is_green & ~is_red).int() * 2 * ONE
    angle = past.mul_(ONE).floor_divide_(chroma.clamp(min=1)).add_(start)
    angle.add_(SECTORS * turn.int()[:, None, None])
    return torch.stack([_channel(angle, middle, low, chroma) for middle in (0, 2, 4)], dim=1)


def _channel(angle: Tensor, middle: int, low: Tensor, chroma: Tensor) -> Tensor:
    """Full within a sector of its own middle, nothing from the second sector on."""
    # an angle is within (-4, 8) sectors, the middle up to 4 from it: two folds at the half circle
    half = SECTORS // 2 * ONE
    away = (angle - middle * ONE).abs_()
    away = away.sub_(half).abs_().sub_(half).abs_()
    share = away.neg_().add_(2 * ONE).clamp_(0, ONE)
    return share.mul_(chroma).add_(ONE // 2).bitwise_right_shift_(BITS).add_(low).to(torch.uint8)


def grey(image: Tensor) -> Tensor:
    """One channel: (B, C, H, W) to (B, 1, H, W).

    Raises ValueError for pictures that are neither grey nor in three colours.
    """
    if image.shape[1] == 1:
        return image
    if image.shape[1] != len(LUMA):
        raise ValueError(
            f"jitter and randaugment change colours of pictures of 1 or 3 channels, and these have "
            f"{image.shape[1]}; leave them out of data.augment"
        )
    red, green, blue = (LUMA[k] * image[:, k : k + 1].int() for k in range(3))
    return ((red + green + blue + ONE // 2) >> BITS).to(torch.uint8)


def blend(image: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """``factor * image + (1 - factor) * other``, rounded and cut to [0, 255]; factors in 2^-16."""
    away = other.int()
    total = (image.int() - away).mul_(factor.int()[:, None, None, None])
    total = total.add_(away, alpha=ONE).add_(ONE // 2).bitwise_right_shift_(BITS)
    return total.clamp_(0, FULL).to(torch.uint8)


def _factor(word: Tensor, strength: float) -> Tensor:
    return _between(word, ONE - fixed(strength), ONE + fixed(strength))


def _between(word: Tensor, low: int, high: int) -> Tensor:
    return low + scaled(word, high - low + 1)
