"""The kinds of branches that can take a layer's place, each made for several branches in one call.

All branches of a convolution see its input as it pads it, and pad nothing themselves. So the map
between a 1x1 and a k x k convolution has at its border what the first makes of the padding, which
is what lets the two become one; and an average includes the padding, for the same reason. Channels
leave in the order (group, branch, channel of the group).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from kdcore.checks import unknown_name

Kind = Literal["same", "1x1", "1x1-kxk", "average", "identity"]
Layer = nn.Conv2d | nn.Linear
Pieces = list[nn.Module]
Normalise = Callable[[int], Pieces]  # from a number of channels: a BatchNorm, or nothing

# that do nothing but normalise, unlike their subclasses
PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


class Crop(nn.Module):
    """The middle of a padded map: what the centre of each window of a convolution sees."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        sides = list(zip(layer.dilation, layer.kernel_size, strict=True))
        self.before = [step * ((size - 1) // 2) for step, size in sides]
        self.after = [step * (size // 2) for step, size in sides]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
        (top, left), (bottom, right) = self.before, self.after
        return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


class Copies(nn.Module):
    """Every channel once for each branch."""

    def __init__(self, count: int, groups: int) -> None:
        super().__init__()
        self.count, self.groups = count, groups

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        grouped = x.reshape(len(x), self.groups, 1, -1, *x.shape[2:])
        return grouped.expand(-1, -1, self.count, -1, -1, -1).flatten(1, 3)


def made(kind: Kind, layer: Layer, count: int, normalise: Normalise) -> nn.Sequential:
    """``count`` branches of one kind in the place of a layer, freshly drawn.

    Weights are normal with the variance of the layer's own, or with that which gives the outputs
    of a smaller kernel the same variance; biases are zero.

    Raises ValueError for an unknown kind, and one that cannot stand in this layer's place.
    """
    if kind not in KINDS:
        raise ValueError(unknown_name("kind of branch", kind, KINDS))
    if isinstance(layer, nn.Linear):
        if kind != "same":
            raise ValueError(f"a linear layer takes branches of kind 'same', not {kind!r}")
        linear = nn.Linear(layer.in_features, count * layer.out_features, layer.bias is not None)
        pieces = [_drawn(linear, like=layer), *normalise(linear.out_features)]
    else:
        pieces = KINDS[kind](layer, count, normalise)
    return nn.Sequential(*pieces).to(layer.weight.device, layer.weight.dtype)


def _same(layer: nn.Conv2d, count: int, normalise: Normalise) -> Pieces:
    conv = _convolution(layer, layer.in_channels, count * layer.out_channels)
    return [_drawn(conv, like=layer), *normalise(conv.out_channels)]


def _pointwise(layer: nn.Conv2d, count: int, normalise: Normalise) -> Pieces:
    width = count * layer.out_channels
    conv = nn.Conv2d(
        layer.in_channels,
        width,
        kernel_size=1,
        stride=_pair(layer.stride),
        groups=layer.groups,
        bias=layer.bias is not None,
    )
    scale = math.sqrt(math.prod(layer.kernel_size))
    return [Crop(layer), _drawn(conv, like=layer, scale=scale), *normalise(width)]


def _pointwise_then_same(layer: nn.Conv2d, count: int, normalise: Normalise) -> Pieces:
    middle = count * layer.in_channels
    first = nn.Conv2d(layer.in_channels, middle, kernel_size=1, groups=layer.groups, bias=False)
    nn.init.normal_(first.weight, std=first.weight[0].numel() ** -0.5)  # keeps the variance
    second = _convolution(layer, middle, count * layer.out_channels, count * layer.groups)
    return [
        first,
        *normalise(middle),
        _drawn(second, like=layer),
        *normalise(second.out_channels),
    ]


def _average(layer: nn.Conv2d, count: int, normalise: Normalise) -> Pieces:
    _check_same_width("average", layer)
    if layer.dilation != (1, 1):
        raise ValueError("a branch of kind 'average' needs dilation 1, and the layer has another")
    pool = nn.AvgPool2d(_pair(layer.kernel_size), _pair(layer.stride))
    return [pool, Copies(count, layer.groups), *_learning("average", count, layer, normalise)]


def _identity(layer: nn.Conv2d, count: int, normalise: Normalise) -> Pieces:
    _check_same_width("identity", layer)
    if layer.stride != (1, 1):
        raise ValueError("a branch of kind 'identity' needs stride 1, and the layer has another")
    copies = Copies(count, layer.groups)
    return [Crop(layer), copies, *_learning("identity", count, layer, normalise)]


KINDS: Mapping[Kind, Callable[[nn.Conv2d, int, Normalise], Pieces]] = {
    "same": _same,
    "1x1": _pointwise,
    "1x1-kxk": _pointwise_then_same,
    "average": _average,
    "identity": _identity,
}


def _convolution(
    layer: nn.Conv2d, in_channels: int, out_channels: int, groups: int | None = None
) -> nn.Conv2d:
    """As the layer, but for its channels and groups, and without padding."""
    return nn.Conv2d(
        in_channels,
        out_channels,
        _pair(layer.kernel_size),
        _pair(layer.stride),
        dilation=_pair(layer.dilation),
        groups=groups or layer.groups,
        bias=layer.bias is not None,
    )


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def _drawn(fresh: Layer, *, like: Layer, scale: float = 1.0) -> Layer:
    deviation = float(like.weight.detach().std(correction=0))
    # a layer that starts at zero must not make its branches alike
    deviation = deviation or like.weight[0].numel() ** -0.5
    nn.init.normal_(fresh.weight, std=scale * deviation)
    if fresh.bias is not None:
        nn.init.zeros_(fresh.bias)
    return fresh


def _check_same_width(kind: Kind, layer: nn.Conv2d) -> None:
    if layer.in_channels != layer.out_channels:
        raise ValueError(
            f"a branch of kind {kind!r} needs as many channels in as out, the layer has "
            f"{layer.in_channels} and {layer.out_channels}"
        )


def _learning(kind: Kind, count: int, layer: nn.Conv2d, normalise: Normalise) -> Pieces:
    norms = normalise(count * layer.out_channels)
    if not norms:
        raise ValueError(
            f"a branch of kind {kind!r} learns by its BatchNorm only, and the layer has none; "
            "leave the kind out or set batch_norm"
        )
    return norms
