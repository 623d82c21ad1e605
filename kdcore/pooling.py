"""What is kept of a layer's map: all of it, or less, named after the layer: ``layer3@gap``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import unknown_name
from kdcore.philox import normal

SEPARATOR = "@"
_PROJECTION = re.compile(r"channels([1-9]\d*)")
_PROJECTION_STREAM = 0  # of a seed that nothing else has: the matrix is part of what is stored
_PROJECTION_SEED = 0x706F6F6C


def split_pooling(layer: str) -> tuple[str, str]:
    """``"layer3@gap"`` as ``("layer3", "gap")``; without a pooling all of the layer: ``"full"``."""
    path, separator, pooling = layer.partition(SEPARATOR)
    return path, pooling if separator else "full"


def pooling_of(layer: str) -> Callable[[Tensor], Tensor]:
    """The function that makes a layer's feature of its output.

    Raises ValueError for a pooling that there is not; the function raises it for what is no map.
    """
    _, name = split_pooling(layer)
    if name == "full":
        return torch.clone  # the next module may work in place
    projection = _PROJECTION.fullmatch(name)
    if projection is None and name not in POOLINGS:
        raise ValueError(unknown_name(f"pooling of {layer!r}", name, [*POOLINGS, "channels16"]))

    def pooled(maps: Tensor) -> Tensor:
        if maps.ndim != 4:
            raise ValueError(
                f"layer {layer!r}: pooling {name!r} needs a map (B, C, H, W), got "
                f"{tuple(maps.shape)}; name the layer without {SEPARATOR + name!r}"
            )
        if projection is not None:
            return projected_channels(maps, count=int(projection[1]))
        return POOLINGS[name](maps)

    return pooled


def channel_means(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
    """Each channel's mean over all positions."""
    return maps.mean(dim=(2, 3))


def channel_statistics(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Each channel's mean over all positions, then each one's standard deviation: d = 2c.

    Of the positions themselves, not of a population they are drawn from: the divisor is HW.
    """
    deviation, mean = torch.std_mean(maps, dim=(2, 3), correction=0)
    return torch.cat([mean, deviation], dim=1)


def attention_map(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    r"""Root mean square over the channels: all that attention transfer of power 2 reads of a map.

    .. math:: r(x) = \sqrt{\tfrac1C \sum_c x_c^2}, \quad a(r(x)) = a(x)

    with the attention a of ``attention_transfer``. The root, so that the same loss reads both.
    """
    return maps.square().mean(dim=1, keepdim=True).sqrt()


def coarse_map(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 4 4"]:
    """The map averaged to 4 x 4 positions."""
    return F.adaptive_avg_pool2d(maps, 4)


def projected_channels(maps: Float[Tensor, "b c h w"], *, count: int) -> Float[Tensor, "b k h w"]:
    r"""Each position's channels times a fixed random matrix, to ``count`` channels.

    .. math:: y = P x, \quad P_{kc} \sim \mathcal N(0, 1/k)

    Squared distances keep their expectation. The matrix is a pure function of its shape.

    Source: Johnson & Lindenstrauss 1984; Gaussian as in Dasgupta & Gupta 2003.
    """
    matrix = _projection(maps.shape[1], count).to(maps)
    return torch.einsum("kc,bchw->bkhw", matrix, maps)


@cache
def _projection(channels: int, count: int) -> Tensor:
    drawn = normal(
        torch.arange(channels),
        (count,),
        epoch=0.0,
        stream=_PROJECTION_STREAM,
        seed=_PROJECTION_SEED,
    )
    return drawn.mT / math.sqrt(count)


POOLINGS = {
    "gap": channel_means,
    "gap+std": channel_statistics,
    "at": attention_map,
    "pool4": coarse_map,
}
