"""RandAugment's table: fourteen operations, each at one strength from 0 to 30."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipelines.augment import RandAugmentConfig
from pipelines.views.colour import FULL, blend, brightness, contrast, saturation
from pipelines.views.draws import Draws, scaled
from pipelines.views.fixed_point import BITS, ONE
from pipelines.views.geometry import WEIGHT, sampled

STRONGEST = 30
# Pixels, strength, and a sign for each picture; pictures in and out.
Operation = Callable[[Tensor, int, Tensor], Tensor]

# Sines of 0 to 30 whole degrees in 2^-16. Literal, so that no library's rounding has a say.
SINES = (
    *(0, 1144, 2287, 3430, 4572, 5712, 6850, 7987, 9121, 10252, 11380, 12505, 13626, 14742, 15855),
    *(16962, 18064, 19161, 20252, 21336, 22415, 23486, 24550, 25607, 26656, 27697, 28729, 29753),
    *(30767, 31772, 32768),
)
COSINES = (
    *(65536, 65526, 65496, 65446, 65376, 65287, 65177, 65048, 64898, 64729, 64540, 64332, 64104),
    *(63856, 63589, 63303, 62997, 62672, 62328, 61966, 61584, 61183, 60764, 60326, 59870, 59396),
    *(58903, 58393, 57865, 57319, 56756),
)


def randaugment(image: Tensor, draws: Draws, config: RandAugmentConfig) -> Tensor:
    """Some operations of the table one after the other, drawn for each picture.

    Source: Cubuk and others 2019, arXiv:1909.13719, with the ranges of torchvision's RandAugment.
    Between pixels we weigh the neighbours where torchvision takes the nearest, and brightness is
    rounded where Pillow cuts off.
    """
    every = torch.arange(len(image), device=image.device)
    words = draws.more("randaugment", config.operations, rows=every, first=0)
    image = image.clone()
    for drawn in words.unflatten(1, (config.operations, 4)).unbind(1):
        choice, sign = scaled(drawn[:, 0], len(TABLE)), 1 - 2 * (drawn[:, 1] & 1)
        for number, operation in enumerate(TABLE.values()):
            rows = (choice == number).nonzero().squeeze(1)
            if len(rows):
                image[rows] = operation(image[rows], config.magnitude, sign[rows])
    return image


def identity(image: Tensor, _: int, __: Tensor) -> Tensor:
    """The picture as it is."""
    return image


def shear_x(image: Tensor, strength: int, sign: Tensor) -> Tensor:
    """Rows shifted by up to 0.3 of their number, the first stays."""
    row, column = _grid(image)
    return sampled(image, row, column + (_shear(strength, sign) * row >> BITS))


def shear_y(image: Tensor, strength: int, sign: Tensor) -> Tensor:
    """Columns shifted by up to 0.3 of their number, the first stays."""
    row, column = _grid(image)
    return sampled(image, row + (_shear(strength, sign) * column >> BITS), column)


def translate_x(image: Tensor, strength: int, sign: Tensor) -> Tensor:
    """Shifted by up to 150/331 of the width, in whole pixels."""
    row, column = _grid(image)
    return sampled(image, row, column + _shift(image.shape[3], strength) * _each(sign))


def translate_y(image: Tensor, strength: int, sign: Tensor) -> Tensor:
    """Shifted by up to 150/331 of the height, in whole pixels."""
    row, column = _grid(image)
    return sampled(image, row + _shift(image.shape[2], strength) * _each(sign), column)


def rotate(image: Tensor, strength: int, sign: Tensor) -> Tensor:
    """Turned about its centre by up to 30 degrees."""
    row, column = _grid(image)
    height, width = image.shape[2:]
    across, down = 2 * column - (width - 1) * WEIGHT, 2 * row - (height - 1) * WEIGHT
    sine, cosine = _each(sign) * SINES[strength], COSINES[strength]
    turned_column = (cosine * across - sine * down) >> (BITS + 1)
    turned_row = (sine * across + cosine * down) >> (BITS + 1)
    return sampled(
        image,
        turned_row + (height - 1) * WEIGHT // 2,
        turned_column + (width - 1) * WEIGHT // 2,
    )


def solarize(image: Tensor, strength: int, _: Tensor) -> Tensor:
    """Inverted from a level on that falls from 255 to 0."""
    bright = image.int() * STRONGEST >= FULL * (STRONGEST - strength)
    return torch.where(bright, FULL - image, image)


def posterize(image: Tensor, strength: int, _: Tensor) -> Tensor:
    """The upper 8 to 4 bits of each channel."""
    dropped = (4 * strength + STRONGEST // 2) // STRONGEST
    return image >> dropped << dropped


def sharpness(image: Tensor, strength: int, sign: Tensor) -> Tensor:
    """Away from the smoothed picture, or towards it; the border stays."""
    return blend(image, _smooth(image), _factor(strength, sign))


def autocontrast(image: Tensor, _: int, __: Tensor) -> Tensor:
    """Each channel stretched to the whole range, unless it has one level only."""
    low, high = image.amin(dim=(2, 3), keepdim=True), image.amax(dim=(2, 3), keepdim=True)
    span = (high - low).int()
    stretched = (image - low).int() * FULL // span.clamp(min=1)
    return torch.where(span > 0, stretched, image).to(torch.uint8)


def equalize(image: Tensor, _: int, __: Tensor) -> Tensor:
    """Each channel's levels used about equally often, as Pillow does it.

    A level becomes the count of darker pixels in steps of 1/255 of all but the brightest level's.
    """
    plane = image.flatten(2).long()
    counts = torch.zeros(*plane.shape[:2], FULL + 1, dtype=torch.int64, device=image.device)
    counts.scatter_add_(2, plane, torch.ones_like(plane))
    brightest = counts.gather(2, plane.amax(dim=2, keepdim=True))
    step = (plane.shape[2] - brightest) // FULL
    darker = counts.cumsum(dim=2) - counts
    level = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=FULL)
    seen = level.gather(2, plane).view(image.shape).to(torch.uint8)
    return torch.where(step[..., None] > 0, seen, image)


TABLE: Mapping[str, Operation] = {
    "identity": identity,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
    "brightness": lambda image, strength, sign: brightness(image, _factor(strength, sign)),
    "saturation": lambda image, strength, sign: saturation(image, _factor(strength, sign)),
    "contrast": lambda image, strength, sign: contrast(image, _factor(strength, sign)),
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
}


def _grid(image: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pixels of each picture, (B, H, W) in 2^-11 of a pixel."""
    count, _, height, width = image.shape
    row = WEIGHT * torch.arange(height, device=image.device)[None, :, None]
    column = WEIGHT * torch.arange(width, device=image.device)[None, None, :]
    return row.expand(count, height, width), column.expand(count, height, width)


def _shear(strength: int, sign: Tensor) -> Tensor:
    return _each(sign) * (3 * strength * ONE // (10 * STRONGEST))


def _shift(size: int, strength: int) -> int:
    return 150 * size * strength // (331 * STRONGEST) * WEIGHT


def _factor(strength: int, sign: Tensor) -> Tensor:
    """1 +- up to 0.9, in 2^-16."""
    return ONE + sign * (9 * strength * ONE // (10 * STRONGEST))


def _each(sign: Tensor) -> Tensor:
    return sign[:, None, None]


def _smooth(image: Tensor) -> Tensor:
    """The mean of 3x3 pixels, of which the middle counts five times."""
    height, width = image.shape[2:]
    if min(height, width) < 3:
        return image
    wide = image.int()
    total = 4 * wide[..., 1:-1, 1:-1]
    for down in range(3):
        for right in range(3):
            total = total + wide[..., down : height - 2 + down, right : width - 2 + right]
    smoothed = image.clone()
    smoothed[..., 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)  # of 13 shares, half up
    return smoothed
