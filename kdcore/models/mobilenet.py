"""MobileNetV2 for small pictures: blocks that widen, filter each channel and narrow again."""

from __future__ import annotations

from collections import OrderedDict

from jaxtyping import Float
from torch import Tensor, nn

from kdcore.models.initialisation import draw_classifier, draw_convolutions

# expansion, channels, blocks, stride of the first: table 2 of the paper, but for 24 channels a
# stride of 1, since small pictures have few pixels
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(
    num_classes: int, in_channels: int = 3, *, width_multiplier: float = 0.5
) -> nn.Module:
    """MobileNetV2 with half of its channels: what the distillation tables call MobileNetV2.

    Layers: ``blocks.0`` to ``blocks.6``; the literature compares ``blocks.1`` (16x16 for a picture
    of 32x32), ``blocks.2`` (8x8), ``blocks.4`` (4x4) and ``blocks.6`` (2x2). These end in a
    BatchNorm or a sum without ReLU, so each is its own pre-activation. Of the convolution after
    them, ``conv2``, it is ``conv2.1``. Parameter names are those of the checkpoints that circulate.

    Source: Sandler et al. 2018, arXiv:1801.04381, table 2, as in the code of Tian, Krishnan & Isola
    2020 (CRD), arXiv:1910.10699. It differs from the paper in ReLU for ReLU6 and in the strides;
    from torchvision also in widths that are not rounded to multiples of 8, in a 1x1 convolution in
    the block that does not expand, and in that it has no dropout.
    """
    width = stem_width = int(32 * width_multiplier)
    stages: list[nn.Module] = []
    for expansion, channels, blocks, stride in STAGES:
        out_channels = int(channels * width_multiplier)
        stages.append(_stage(width, out_channels, blocks, expansion=expansion, stride=stride))
        width = out_channels
    last_width = int(1280 * max(1.0, width_multiplier))
    classifier = nn.Linear(last_width, num_classes)
    net = nn.Sequential(
        OrderedDict(
            conv1=_activated(in_channels, stem_width, kernel_size=3, stride=2),
            blocks=nn.Sequential(*stages),
            conv2=_activated(width, last_width, kernel_size=1, stride=1),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(classifier),  # of one, as in the checkpoints
        )
    )
    draw_convolutions(net, fan="fan_out")
    draw_classifier(classifier)
    return net


class _InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.conv = nn.Sequential(
            *_activated(in_channels, wide, kernel_size=1, stride=1),
            *_activated(wide, wide, kernel_size=3, stride=stride, groups=wide),
            nn.Conv2d(wide, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        out: Tensor = self.conv(x)
        return x + out if self.has_shortcut else out


def _activated(
    in_channels: int, out_channels: int, *, kernel_size: int, stride: int, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _stage(
    in_channels: int, out_channels: int, blocks: int, *, expansion: int, stride: int
) -> nn.Module:
    first = _InvertedResidual(in_channels, out_channels, expansion=expansion, stride=stride)
    others = (
        _InvertedResidual(out_channels, out_channels, expansion=expansion, stride=1)
        for _ in range(blocks - 1)
    )
    return nn.Sequential(first, *others)
