"""Networks that turn random numbers into pictures, as the data-free literature draws them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.batch_norm import BatchNorm

Ending = Literal["sigmoid", "tanh_batch_norm", "batch_norm"]


@dataclass(frozen=True, kw_only=True)
class GeneratorNetwork:
    """Two doublings of the resolution; sizes and the last layer are the publications' own.

    ``sigmoid`` ends in pixels (CMI, FastDFKD); ``tanh_batch_norm`` (DAFL) and ``batch_norm`` (ZSKT)
    in the space that a network takes. ``batch_norm_eps`` of 0.8 is DAFL's code, which means to set
    the momentum.
    """

    latent: int = 256
    width: int = 64
    ending: Ending = "sigmoid"
    batch_norm_eps: float = 1e-5

    def build(self, channels: int, size: int) -> Generator:
        return Generator(self, channels, size)


@final
class Generator(nn.Module):
    """Latents (B, L) to pictures (B, C, S, S): linear, then three convolutions.

    BatchNorm spans the workers, so that two make the pictures of one. ``makes_pixels`` says whether
    the pictures still have to be normalised for a network.

    Raises ValueError for a size that is no multiple of 4.

    Source: Chen and others 2019 (DAFL), arXiv:1904.01186; Micaelli & Storkey 2019 (ZSKT),
    arXiv:1905.09768; Fang and others 2021 (CMI), arXiv:2105.08584: one network with three endings,
    of which the last has convolutions without bias.
    """

    def __init__(self, plan: GeneratorNetwork, channels: int, size: int) -> None:
        super().__init__()
        if size % 4:
            raise ValueError(f"a generator doubles twice: size must be a multiple of 4, got {size}")
        self.latent = plan.latent
        self.makes_pixels = plan.ending == "sigmoid"
        wide, start = 2 * plan.width, size // 4
        self.linear = nn.Linear(plan.latent, wide * start * start)
        self.unflatten = nn.Unflatten(1, (wide, start, start))
        self.body = nn.Sequential(
            BatchNorm(wide),
            nn.Upsample(scale_factor=2),
            *_block(wide, wide, plan),
            nn.Upsample(scale_factor=2),
            *_block(wide, plan.width, plan),
            nn.Conv2d(plan.width, channels, 3, padding=1),
        )
        self.ending = _ending(plan.ending, channels)

    def forward(self, latent: Float[Tensor, "b l"]) -> Float[Tensor, "b c s s"]:
        maps = self.body(self.unflatten(self.linear(latent)))
        image: Tensor = self.ending(maps)
        return image


@torch.no_grad()
def redraw(net: nn.Module, generator: torch.Generator, *, std: float = 0.02) -> None:
    """Draw all weights anew: N(0, 0.02), of BatchNorm N(1, 0.02); biases and statistics are reset.

    By a generator of the CPU, the same numbers on every device and in every layout.

    Source: the code of Fang and others 2021 (CMI), arXiv:2105.08584, before every batch.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.copy_(_normal(module.weight, 0.0, std, generator))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, BatchNorm):
            nn.init.zeros_(module.running_mean)
            nn.init.ones_(module.running_var)
            if module.weight.requires_grad:
                module.weight.copy_(_normal(module.weight, 1.0, std, generator))
                nn.init.zeros_(module.bias)


def _normal(like: Tensor, mean: float, std: float, generator: torch.Generator) -> Tensor:
    # made beside the weights: torch fills a GPU's from a generator of the GPU only
    return torch.empty(like.shape, dtype=like.dtype).normal_(mean, std, generator=generator)


def _block(in_channels: int, out_channels: int, plan: GeneratorNetwork) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=plan.ending != "sigmoid"),
        BatchNorm(out_channels, eps=plan.batch_norm_eps),
        nn.LeakyReLU(0.2),
    ]


def _ending(ending: Ending, channels: int) -> nn.Module:
    if ending == "sigmoid":
        return nn.Sigmoid()
    if ending == "batch_norm":
        return BatchNorm(channels)
    # without scale and shift to learn: that it never changes from 1 and 0 is the same
    return nn.Sequential(nn.Tanh(), BatchNorm(channels).requires_grad_(False))
