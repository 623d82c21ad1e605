"""A plain convolutional network, small enough for a laptop's minute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


def convnet(num_classes: int, in_channels: int = 3, *, width: int = 16) -> nn.Module:
    """Three 3x3 convolutions with BatchNorm and ReLU, widths w, 2w, 4w; average pool; classifier.

    The second and third halve the resolution. Layers: ``block1``, ``block2``, ``block3``; before
    their ReLU ``block1.1``, ``block2.1``, ``block3.1``.
    """
    return plain(num_classes, in_channels, widths=(width, 2 * width, 4 * width), strides=(1, 2, 2))


def plain(
    num_classes: int, in_channels: int = 3, *, widths: Sequence[int], strides: Sequence[int]
) -> nn.Module:
    """As ``convnet``, a block for each width and stride: ``block1``, ``block2``, ..."""
    sizes = zip((in_channels, *widths[:-1]), widths, strides, strict=True)
    blocks = [
        (f"block{number}", _block(before, after, stride=stride))
        for number, (before, after, stride) in enumerate(sizes, start=1)
    ]
    head = [
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("classifier", nn.Linear(widths[-1], num_classes)),
    ]
    return nn.Sequential(OrderedDict([*blocks, *head]))


def _block(in_channels: int, out_channels: int, *, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
