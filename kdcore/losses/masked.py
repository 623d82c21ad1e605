"""Losses on the teacher's map as generated from a part of the student's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.losses.maps import Connectors
from kdcore.philox import uniform
from kdcore.terms import Term
from kdcore.types import Batch, Outputs, Probe


class MaskedGeneration(Term):
    r"""Squared difference of the teacher's map and one generated from the student's with gaps.

    .. math:: \sum_l \frac1B \sum_{bchw} \big( G_l(m \odot r_l(s_l)) - t_l \big)^2, \quad
        m \sim \mathrm{Bernoulli}(1 - \lambda)

    summed over a picture, with a generator G of two 3x3 convolutions and a projector r. The mask
    leaves out whole channels, or positions in all channels. It is a function of the picture's row,
    the epoch and ``seed``: the same on any worker and after a run is resumed.

    Source: Yang and others 2022 (MGD), arXiv:2205.01529, section 3. The mask of channels and its
    ratio are their code's for classification; for detection they mask 0.65 of the positions.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        probe: Probe,
        *,
        ratio: float = 0.15,
        mask: Literal["channels", "positions"] = "channels",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio, the share left out, must be in [0, 1), got {ratio}")
        self.maps = Connectors(layers, probe)
        self.generators = nn.ModuleList(
            _generator(pair.teacher_shape[1]) for pair in self.maps.pairs
        )
        self.ratio, self.mask, self.seed = ratio, mask, seed

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Float[Tensor, ""]:
        errors = []
        for place, (here, there) in enumerate(self.maps(student, teacher)):
            kept = here * self.drawn_mask(here, batch, stream=place)
            difference = self.generators[place](kept) - there
            errors.append(difference.square().sum(dim=(1, 2, 3)).mean())
        return torch.stack(errors).sum()

    def drawn_mask(
        self, maps: Float[Tensor, "b c h w"], batch: Batch, *, stream: int
    ) -> Float[Tensor, "b ..."]:
        """1 for what is kept and 0 for what is left out, in a shape that multiplies the maps."""
        _, channels, height, width = maps.shape
        shape = (channels, 1, 1) if self.mask == "channels" else (1, height, width)
        drawn = uniform(batch.index, shape, epoch=batch.epoch, stream=stream, seed=self.seed)
        return (drawn >= self.ratio).to(maps)


def _generator(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )
