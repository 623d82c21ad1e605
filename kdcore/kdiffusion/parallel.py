"""Branches at work: all of a layer at once, and their combination in the layer's place."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdcore.kdiffusion.kinds import Layer


class Aside(NamedTuple):
    """What branches stand in for, put aside where torch does not look: not trained, not saved."""

    stage: str  # as it was asked for
    layer: Layer
    norm: _BatchNorm | None
    place: nn.Module  # what stands where the norm was, if there was one


class Parallel(nn.Module):
    """All branches of one layer at once: (B, ...) to (B, branches, ...).

    Branches of one kind stand together and are one call.
    """

    def __init__(self, layer: Layer, kinds: nn.ModuleDict) -> None:
        super().__init__()
        self.kinds = kinds
        self._layer = (layer,)  # a tuple, in which torch does not look

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b branches ..."]:
        (layer,) = self._layer
        padded = x if isinstance(layer, nn.Linear) else _padded(x, layer)
        outputs = [_apart(branches(padded), layer) for branches in self.kinds.values()]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class Branches(nn.Module):
    """The combination of the branches, where the layer and its norm were.

    The same in training and evaluation: only so can the branches become one layer.
    """

    def __init__(self, branches: Parallel, coefficient: float, aside: Aside) -> None:
        super().__init__()
        self.branches = branches
        self.coefficient = coefficient
        self.aside = aside

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        combined: Tensor = self.branches(x).sum(1) * self.coefficient
        return combined


def _padded(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """The map as the layer itself pads it."""
    sides = _padding(layer)
    if not any(sides):
        return x
    return F.pad(x, sides, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _padding(layer: nn.Conv2d) -> list[int]:
    """Left, right, top and bottom."""
    if layer.padding == "same":
        (tall, wide), (height, width) = layer.dilation, layer.kernel_size
        down, across = tall * (height - 1), wide * (width - 1)
        return [across // 2, across - across // 2, down // 2, down - down // 2]
    if isinstance(layer.padding, str):  # "valid"
        return [0, 0, 0, 0]
    vertical, horizontal = layer.padding
    return [horizontal, horizontal, vertical, vertical]


def _apart(outputs: Tensor, layer: Layer) -> Float[Tensor, "b branches ..."]:
    """The channels of several branches, of which a linear layer's are last, as branches."""
    width = layer.weight.shape[0]
    if isinstance(layer, nn.Linear):
        return outputs.reshape(*outputs.shape[:-1], -1, width).movedim(-2, 1)
    groups, size = layer.groups, outputs.shape[2:]
    grouped = outputs.reshape(len(outputs), groups, -1, width // groups, *size)
    return grouped.transpose(1, 2).reshape(len(outputs), -1, width, *size)
