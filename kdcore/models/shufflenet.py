"""ShuffleNet V1 and V2 for small pictures: grouped or split channels, mixed by a shuffle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

STEM_WIDTH = 24  # of both versions
UNITS = (4, 8, 4)  # per stage, in both versions; the first of each halves the resolution
GROUPS = 3  # version 1
WIDTHS_V1 = (240, 480, 960)  # its table 1, for three groups
WIDTHS_V2 = (116, 232, 464)  # its table 5, for complexity 1x
LAST_WIDTH_V2 = 1024


def shufflenet_v1(num_classes: int, in_channels: int = 3) -> nn.Module:
    """ShuffleNet with three groups, widths 240, 480, 960.

    Layers: ``layer1``, ``layer2``, ``layer3``, at half, a quarter and an eighth of the picture's
    size. A unit's value before its last ReLU is its ``.preactivation``; of the stages,
    ``layer1.3.preactivation``, ``layer2.7.preactivation`` and ``layer3.3.preactivation``. Parameter
    names are those of the checkpoints that circulate.

    Source: Zhang et al. 2018, arXiv:1707.01083, table 1, as in the code of Tian, Krishnan & Isola
    2020 (CRD), arXiv:1910.10699. That differs from the paper: the stem is a 1x1 convolution at
    stride 1 without pool, and a ReLU follows the depthwise convolution.
    """
    return _ShuffleNetV1(num_classes, in_channels)


def shufflenet_v2(num_classes: int, in_channels: int = 3) -> nn.Module:
    """ShuffleNetV2 1x, widths 116, 232, 464, then 1024 before the pool.

    Layers: ``layer1``, ``layer2``, ``layer3``, at half, a quarter and an eighth of the picture's
    size; before their last ReLU ``layer1.3.preactivation``, ``layer2.7.preactivation`` and
    ``layer3.3.preactivation``, with channels in the order of the stage's output. Before the last
    ReLU of all: ``bn2``. Parameter names are those of the checkpoints that circulate.

    Source: Ma et al. 2018, arXiv:1807.11164, table 5, as in the code of Tian, Krishnan & Isola 2020
    (CRD), arXiv:1910.10699, whose stem is a 1x1 convolution at stride 1 without pool, and whose
    pre-activations are not yet shuffled.
    """
    return _ShuffleNetV2(num_classes, in_channels)


def channel_shuffle(x: Float[Tensor, "b c h w"], groups: int) -> Float[Tensor, "b c h w"]:
    """Deal the channels of each group out in turn: channel i of group g goes to place i G + g."""
    b, c, h, w = x.shape
    return x.reshape(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class _ShuffleNetV1(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.layer1 = _stage_v1(STEM_WIDTH, WIDTHS_V1[0], UNITS[0])
        self.layer2 = _stage_v1(WIDTHS_V1[0], WIDTHS_V1[1], UNITS[1])
        self.layer3 = _stage_v1(WIDTHS_V1[1], WIDTHS_V1[2], UNITS[2])
        self.linear = nn.Linear(WIDTHS_V1[2], num_classes)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        out = F.relu(self.bn1(self.conv1(image)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


class _GroupUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; added to its input, or beside it."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        added = out_channels - in_channels if stride == 2 else out_channels
        inner = added // 4
        # the stem has too few channels to be grouped
        self.groups = 1 if in_channels == STEM_WIDTH else GROUPS
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, added, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(added)
        self.stride = stride
        self.preactivation = nn.Identity()  # gives the value a path, so that it can be tapped

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        out = channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 2:
            joined = torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        else:
            joined = out + x
        return F.relu(self.preactivation(joined))


class _ShuffleNetV2(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.layer1 = _stage_v2(STEM_WIDTH, WIDTHS_V2[0], UNITS[0])
        self.layer2 = _stage_v2(WIDTHS_V2[0], WIDTHS_V2[1], UNITS[1])
        self.layer3 = _stage_v2(WIDTHS_V2[1], WIDTHS_V2[2], UNITS[2])
        self.conv2 = nn.Conv2d(WIDTHS_V2[2], LAST_WIDTH_V2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(LAST_WIDTH_V2)
        self.linear = nn.Linear(LAST_WIDTH_V2, num_classes)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        out = F.relu(self.bn1(self.conv1(image)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.relu(self.bn2(self.conv2(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


class _SplitUnit(nn.Module):
    """Keeps half of its channels, changes the other half, shuffles both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.preactivation = nn.Identity()  # gives the value a path, so that it can be tapped

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        kept, changed = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(changed)))
        out = self.bn3(self.conv3(self.bn2(self.conv2(out))))
        out = channel_shuffle(torch.cat([kept, out], dim=1), 2)
        # a ReLU has seen the kept half: a second one changes neither it nor its gradient
        return F.relu(self.preactivation(out))


class _DownUnit(nn.Module):
    """Halves the resolution in two branches, each of half of the channels, and shuffles both."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(
            in_channels, in_channels, 3, 2, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        right = self.bn5(self.conv5(right))
        return F.relu(channel_shuffle(torch.cat([left, right], dim=1), 2))


def _stage_v1(in_channels: int, out_channels: int, units: int) -> nn.Module:
    first = _GroupUnit(in_channels, out_channels, stride=2)
    others = (_GroupUnit(out_channels, out_channels, stride=1) for _ in range(units - 1))
    return nn.Sequential(first, *others)


def _stage_v2(in_channels: int, out_channels: int, units: int) -> nn.Module:
    others = (_SplitUnit(out_channels) for _ in range(units - 1))
    return nn.Sequential(_DownUnit(in_channels, out_channels), *others)
