"""The small-image networks that the literature compares on; all else is timm and torchvision.

Names are those of the distillation literature's code, such as ``resnet32x4``. So are the names of
the parameters, so that its checkpoints load. Each network ends in one linear layer, whose input
(B, D) is the embedding; each function's docstring names the layers to compare, and for each the one
before its last ReLU, which some losses need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from kdcore.models.convnet import convnet
from kdcore.models.mobilenet import mobilenet_v2
from kdcore.models.resnet import cifar_resnet, cifar_resnet_x4
from kdcore.models.shufflenet import shufflenet_v1, shufflenet_v2
from kdcore.models.vgg import vgg
from kdcore.models.wide_resnet import wide_resnet

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "convnet": convnet,
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(cifar_resnet_x4, depth) for depth in (8, 32)},
    **{f"wrn_{d}_{k}": partial(wide_resnet, d, k) for d in (16, 40) for k in (1, 2)},
    "vgg8": partial(vgg, 1),
    "vgg13": partial(vgg, 2),
    "mobilenet_v2": mobilenet_v2,
    "shufflenet_v1": shufflenet_v1,
    "shufflenet_v2": shufflenet_v2,
}
