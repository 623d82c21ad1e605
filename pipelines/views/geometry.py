"""Moving pixels: crop, mirror, resize, and the affine maps, with integer weights between pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.augment import ResizedCropConfig
from pipelines.views.boxes import ATTEMPTS, Boxes, drawn_boxes
from pipelines.views.draws import Draws, scaled

# Of the weight between two pixels. Two weights and a pixel fill 2 * 11 + 8 bits of an int32.
WEIGHT_BITS = 11
WEIGHT = 1 << WEIGHT_BITS


def crop(image: Tensor, draws: Draws, padding: int) -> Tensor:
    """Padded with black and cut to the original size, at one of (2 * padding + 1)^2 places."""
    height, width = image.shape[2:]
    offset = scaled(draws.first["crop"][:, :2], 2 * padding + 1)
    padded = F.pad(image, [padding] * 4)
    row = torch.arange(height, device=image.device) + offset[:, :1]
    start = _row_numbers(padded, row) * padded.shape[3] + offset[:, 1][:, None, None]
    # a row of the view is a run of bytes of the padded picture: all such runs, and some of them
    count = max(padded.numel() - width + 1, 0)
    runs = padded.flatten().as_strided((count, width), (1, 1))
    return runs.index_select(0, start.flatten()).view(image.shape)


def flip(image: Tensor, draws: Draws, _: bool) -> Tensor:
    """Mirrored left to right with probability 1/2."""
    rows = (draws.first["flip"][:, 0] & 1).nonzero().squeeze(1)
    return image.index_copy(0, rows, image.index_select(0, rows).flip(3))


def resized_crop(image: Tensor, draws: Draws, config: ResizedCropConfig) -> Tensor:
    """A random box, resized to the picture."""
    every = torch.arange(len(image), device=image.device)
    words = draws.more("resized_crop", ATTEMPTS, rows=every)
    height, width = image.shape[2:]
    return resized(image, drawn_boxes(words, (height, width), config, fallback=(height, width)))


def resized(image: Tensor, boxes: Boxes) -> Tensor:
    """What is in the boxes, as large as the pictures: bilinear, no pixel outside them counts.

    A box is never larger than the picture, so that nothing has to be averaged first.
    """
    height, width = image.shape[2:]
    upper, lower, down = _neighbours(boxes.top, boxes.height, height)
    left, right, along = _neighbours(boxes.left, boxes.width, width)
    flat = image.reshape(-1, width)
    above, below = (
        flat.index_select(0, _row_numbers(image, row).flatten()).view(image.shape).int()
        for row in (upper, lower)
    )
    between = _weighed(above, below, down[:, None, :, None])
    first, second = (
        between.gather(3, column[:, None, None, :].expand(image.shape)) for column in (left, right)
    )
    return _rounded(_weighed(first, second, along[:, None, None, :]))


def sampled(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The pictures at places between pixels, (B, H, W) in 2^-11 of a pixel; outside is black."""
    height, width = image.shape[2:]
    padded = F.pad(image, [1, 1, 1, 1]).flatten(2)
    # outside is as black one pixel away as further: its neighbours are in the padding
    row = row.clamp(-WEIGHT, height * WEIGHT - 1) + WEIGHT
    column = column.clamp(-WEIGHT, width * WEIGHT - 1) + WEIGHT
    corner = (row >> WEIGHT_BITS) * (width + 2) + (column >> WEIGHT_BITS)
    down, along = (row & (WEIGHT - 1)).int(), (column & (WEIGHT - 1)).int()
    total = torch.zeros_like(image, dtype=torch.int32)
    for below, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = (down if below else WEIGHT - down) * (along if right else WEIGHT - along)
        place = (corner + below * (width + 2) + right).flatten(1)[:, None, :]
        taken = padded.gather(2, place.expand(-1, image.shape[1], -1))
        total += taken.view(image.shape).int().mul_(weight[:, None])
    return _rounded(total)


def _neighbours(start: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of ``size`` places in a side of a box the pixels around it, and the second's weight.

    Centres of pixels lie on centres, as in torch's ``align_corners=False``.
    """
    place = 2 * torch.arange(size, device=start.device) + 1
    position = ((place * length[:, None] - size) * WEIGHT) // (2 * size)
    position = position.clamp(min=0).minimum((length[:, None] - 1) * WEIGHT)
    before = position >> WEIGHT_BITS
    after = (before + 1).minimum(length[:, None] - 1)
    first = start[:, None]
    return before + first, after + first, (position & (WEIGHT - 1)).int()


def _row_numbers(image: Tensor, row: Tensor) -> Tensor:
    """Rows of every picture among all rows of the batch: (B, H) to (B, C, H)."""
    count, channels, height, _ = image.shape
    plane = torch.arange(count * channels, device=image.device).view(count, channels, 1)
    return plane * height + row[:, None]


def _weighed(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """``(WEIGHT - weight) * first + weight * second``, in the memory of the second."""
    return second.sub_(first).mul_(weight).add_(first, alpha=WEIGHT)


def _rounded(total: Tensor) -> Tensor:
    """A sum of pixels with two weights each, as pixels again."""
    half = 1 << (2 * WEIGHT_BITS - 1)
    return total.add_(half).bitwise_right_shift_(2 * WEIGHT_BITS).to(torch.uint8)
