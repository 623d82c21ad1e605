"""The small-image networks that the literature compares on; all else is timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from kdcore.models.convnet import convnet
from kdcore.models.resnet import cifar_resnet

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "convnet": convnet,
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
}
