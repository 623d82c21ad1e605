"""Views of invented pictures, differentiable, with numbers of their own for each picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcore.datafree.draws import Draw, Stream
from kdcore.datafree.images import Normalisation


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What a view does: first ``roll`` for the whole batch, then crop and flip for each picture."""

    roll: int = 0  # pixels at most in each direction, around the edge
    crop: int = 0  # pixels of black padding before a crop of the original size
    flip: bool = False  # horizontal, with probability 1/2

    def __call__(
        self, image: Float[Tensor, "b c h w"], draw: Draw, normalisation: Normalisation
    ) -> Float[Tensor, "b c h w"]:
        """The view of pictures in the network's space, in which black is not 0."""
        if self.roll:
            image = rolled(image, self.roll, draw)
        if self.crop:
            image = cropped(image, self.crop, draw, black=normalisation.black(image))
        return flipped(image, draw) if self.flip else image

    def local(self, image: Float[Tensor, "b c h w"], draw: Draw) -> Float[Tensor, "b c h w"]:
        """A part of each picture, mirrored where views are, but by numbers of its own."""
        part = resized_crop(image, draw)
        return flipped(part, draw, stream=Stream.LOCAL_FLIP) if self.flip else part


def rolled(image: Float[Tensor, "b c h w"], limit: int, draw: Draw) -> Float[Tensor, "b c h w"]:
    """All pictures moved by the same random number of pixels, what leaves coming in opposite.

    Source: the code of Yin and others 2020 (DeepInversion), arXiv:1912.08795.
    """
    down, right = draw.shared().integers((2,), 2 * limit + 1, Stream.ROLL)[0].tolist()
    return image.roll((down - limit, right - limit), dims=(2, 3))


def cropped(
    image: Float[Tensor, "b c h w"], padding: int, draw: Draw, *, black: Float[Tensor, "#c 1 1"]
) -> Float[Tensor, "b c h w"]:
    """Each picture padded with ``black`` and cut out again at a place of its own."""
    batch, channels, height, width = image.shape
    around = F.pad(torch.zeros_like(image[:1, :1]), (padding,) * 4, value=1.0)
    padded = F.pad(image, (padding,) * 4) + around * black
    top, left = draw.integers((2,), 2 * padding + 1, Stream.CROP).to(image.device).unbind(dim=1)
    rows = top[:, None] + torch.arange(height, device=image.device)
    columns = left[:, None] + torch.arange(width, device=image.device)
    number = torch.arange(batch, device=image.device)[:, None, None, None]
    channel = torch.arange(channels, device=image.device)[None, :, None, None]
    return padded[number, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flipped(
    image: Float[Tensor, "b c h w"], draw: Draw, *, stream: Stream = Stream.FLIP
) -> Float[Tensor, "b c h w"]:
    """Each picture mirrored or not."""
    mirrored = draw.uniform((), stream).to(image.device) < 0.5
    return torch.where(mirrored[:, None, None, None], image.flip(3), image)


def resized_crop(
    image: Float[Tensor, "b c h w"], draw: Draw, *, smallest: float = 0.25
) -> Float[Tensor, "b c h w"]:
    """Of each picture a square of at least ``smallest`` of its area, enlarged to the whole size.

    Source: the local view of Fang and others 2021 (CMI), arXiv:2105.08584, before its flip; theirs
    also changes the aspect ratio.
    """
    area, down, right = draw.uniform((3,), Stream.LOCAL_VIEW).to(image).unbind(dim=1)
    side = (smallest + (1 - smallest) * area).sqrt()
    zero = torch.zeros_like(side)
    shift = (1 - side) * torch.stack([2 * right - 1, 2 * down - 1])
    affine = torch.stack([side, zero, shift[0], zero, side, shift[1]], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(affine, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
