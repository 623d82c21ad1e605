r"""The generator of the hierarchical (ladder) VAE: latent maps from one pixel to the picture.

:math:`z_n \to z_{n-1} \to \dots \to z_1 \to y`, each of 16 channels, without a skip, so that what a
student gets wrong above is all that it has below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Normal

from kdcore.dgm.models.residual import stages
from kdcore.dgm.trace import Trace

CHANNELS = 16  # of every latent
SIZES: Mapping[int, Sequence[int]] = MappingProxyType(
    {32: (16, 8, 4, 2, 1), 64: (32, 16, 8, 4, 1)}  # published, by the picture's
)
_BETA = 0.1


@dataclass(frozen=True)
class Ladder:
    """The sizes of a ladder: teacher and student may differ in width and, by ``match``, in depth.

    ``sizes`` are the latents' heights from z1 up, the last 1. With ``num_conditions`` the input
    ``condition``, one-hot, joins what every network sees.

    Raises ValueError for sizes that do not divide each other.
    """

    width: int
    image_size: int
    sizes: Sequence[int]
    image_channels: int = 3
    num_conditions: int = 0

    def __post_init__(self) -> None:
        uneven = [pair for pair in pairwise([self.image_size, *self.sizes]) if pair[0] % pair[1]]
        if uneven or not self.sizes or self.sizes[-1] != 1:
            raise ValueError(
                f"sizes of latents must divide the picture's {self.image_size} and each other, "
                f"from z1 up to 1, got {tuple(self.sizes)}"
            )


class LadderGenerator(nn.Module):
    r"""p(z) p(y | z): what is distilled. Target ``y``, latents ``z1`` (the largest) to ``zn``.

    .. math:: z_n \sim N(0, I), \quad z_i | z_{i+1} \sim N(\mu_i, \sigma_i^2), \quad
        y | z_1 \sim N(\mu_0, \beta / 2), \ \beta = 0.1

    A condition, where there is one, decides the law of the top.

    Raises ValueError for sizes that differ by no power of two.

    Source: Chen et al. 2023, "Knowledge distillation for deep directed graphical models", CVPR.
    """

    def __init__(self, ladder: Ladder) -> None:
        super().__init__()
        count = ladder.num_conditions
        # twice as many even for the picture, of which only the mean is used, as published
        outputs = [2 * ladder.image_channels] + [2 * CHANNELS] * (len(ladder.sizes) - 1)
        heights = pairwise([ladder.image_size, *ladder.sizes])
        self.networks = nn.ModuleList(
            nn.Sequential(
                stages(CHANNELS + count, ladder.width, factor=to // at, resample="double"),
                nn.Conv2d(ladder.width, channels, 1, bias=False),
            )
            for (to, at), channels in zip(heights, outputs, strict=True)
        )
        self.top = nn.Linear(count, 2 * CHANNELS, bias=False) if count else None

    def forward(self, run: Trace) -> Float[Tensor, "b c h w"]:
        z = run.latent(f"z{self.depth}", self.prior(run))
        for level in range(self.depth - 1, 0, -1):
            z = run.latent(f"z{level}", self.conditional(level, z, run))
        return run.target("y", self.picture(z, run))

    @property
    def depth(self) -> int:
        """How many latents there are."""
        return len(self.networks)

    def prior(self, run: Trace) -> Normal:
        """The law of the latent at the top."""
        if self.top is not None:
            return gaussian_of(self.top(run.input("condition"))[:, :, None, None])
        like = next(self.networks.parameters())
        zero = like.new_zeros(run.num_rows, CHANNELS, 1, 1)
        return Normal(zero, torch.ones_like(zero), validate_args=False)

    def conditional(self, level: int, above: Float[Tensor, "b c h w"], run: Trace) -> Normal:
        """The law of the latent of a level, given that above it."""
        return gaussian_of(self.networks[level](self._seen(above, run)))

    def picture(self, z: Float[Tensor, "b c h w"], run: Trace) -> Normal:
        """The law of the picture, given the latent of level 1."""
        mean = self.networks[0](self._seen(z, run)).chunk(2, dim=1)[0]
        deviation = torch.full_like(mean, math.sqrt(_BETA / 2))
        return Normal(mean, deviation, validate_args=False)

    def _seen(self, maps: Tensor, run: Trace) -> Tensor:
        return maps if self.top is None else conditioned(maps, run.input("condition"))


def gaussian_of(outputs: Float[Tensor, "b c h w"]) -> Normal:
    """Mean and spread, side by side in the channels, as a Gaussian."""
    mean, spread = outputs.chunk(2, dim=1)
    # the standard deviation of an output of 0 is 1
    return Normal(mean, F.softplus(spread) / math.log(2) + 1e-6, validate_args=False)


def conditioned(
    maps: Float[Tensor, "b c h w"], condition: Float[Tensor, "b n"]
) -> Float[Tensor, "b d h w"]:
    """Maps with a condition as further channels, the same at every position."""
    everywhere = condition[:, :, None, None].expand(-1, -1, *maps.shape[2:])
    return torch.cat([maps, everywhere], dim=1)
