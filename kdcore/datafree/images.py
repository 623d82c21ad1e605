"""Priors on the pictures themselves, and the space in which they live. All are minimised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """How pixels in [0, 1] become what a network takes: less the mean, by the deviation.

    One number for every channel, or one each.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_network(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        mean, std = self._columns(pixels)
        return (pixels - mean) / std

    def to_pixels(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        mean, std = self._columns(image)
        return image * std + mean

    def black(self, like: Float[Tensor, "b c h w"]) -> Float[Tensor, "#c 1 1"]:
        """What a network takes for pixels of 0."""
        mean, std = self._columns(like)
        return -mean / std

    def clipped(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The nearest picture whose pixels are in [0, 1]."""
        return self.to_network(self.to_pixels(image).clamp(0, 1))

    def stored(self, image: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
        """The picture in 8 bits, clipped and rounded: what a student will see."""
        return (self.to_pixels(image).clamp(0, 1) * 255).round().to(torch.uint8)

    def loaded(
        self, stored: UInt8[Tensor, "b c h w"], dtype: torch.dtype
    ) -> Float[Tensor, "b c h w"]:
        return self.to_network(stored.to(dtype) / 255)

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (like.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return mean, std


def total_variation(image: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    r"""Mean absolute difference of neighbours, summed over four directions.

    .. math:: \sum_d \overline{|\Delta_d x|}

    Source: the code of Yin and others 2020 (DeepInversion), arXiv:1912.08795, ``tv_l1``.
    """
    return torch.stack([difference.abs().mean() for difference in _differences(image)]).sum()


def total_variation_norm(image: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    r"""Length of the differences of neighbours in the whole batch, summed over four directions.

    .. math:: \sum_d \| \Delta_d x \|_2

    Not squared and not averaged: a batch four times as large has twice the value, and each picture
    half the gradient.

    Source: Yin and others 2020 (DeepInversion), arXiv:1912.08795, as their code has it (``tv_l2``);
    equation 2 sums the lengths of the two differences at each pixel.
    """
    norms: list[Tensor] = [
        torch.linalg.vector_norm(difference) for difference in _differences(image)
    ]
    return torch.stack(norms).sum()


def batch_length(image: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    r"""Length of the whole batch, :math:`\|x\|_2`.

    Source: the code of Yin and others 2020 (DeepInversion), arXiv:1912.08795, for CIFAR-10.
    """
    norm: Tensor = torch.linalg.vector_norm(image)
    return norm


def mean_length(image: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    r"""Mean length of a picture, :math:`\frac1B \sum_b \|x_b\|_2`.

    Source: the code of Yin and others 2020 (DeepInversion), arXiv:1912.08795, for ImageNet.
    """
    norms: Tensor = torch.linalg.vector_norm(image.flatten(1), dim=1)
    return norms.mean()


def _differences(image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """To the right, downwards, and along both diagonals."""
    return (
        image[..., :, :-1] - image[..., :, 1:],
        image[..., :-1, :] - image[..., 1:, :],
        image[..., 1:, :-1] - image[..., :-1, 1:],
        image[..., :-1, :-1] - image[..., 1:, 1:],
    )
