"""The residual networks of the CIFAR experiments: thin, and four times as wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.models.initialisation import draw_convolutions

Shortcut = Literal["zero_padding", "projection"]


def cifar_resnet(
    depth: int,
    num_classes: int,
    in_channels: int = 3,
    *,
    width: int = 16,
    shortcut: Shortcut = "zero_padding",
) -> nn.Module:
    """ResNet of ``depth`` = 6n + 2 layers for small pictures, widths w, 2w, 4w.

    ``shortcut`` says how a stage's input gets its new channels: ``zero_padding`` (option A) has no
    parameters; ``projection`` (option B) is a 1x1 convolution with BatchNorm, and is what the
    distillation literature calls resnet8 to resnet110. Each is initialised as in its own code: He's
    Gaussian by fan-in and by fan-out.

    Layers: ``layer1``, ``layer2``, ``layer3``, each with blocks ``.0`` to ``.n-1``. A block's sum
    before its last ReLU is its ``.preactivation``: of ResNet-20's second stage,
    ``layer2.2.preactivation``. Parameter names are those of the checkpoints that circulate.

    Raises ValueError for a depth or a shortcut that is none of these.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2, with shortcut option A; with B, the code
    of Tian, Krishnan & Isola 2020 (CRD), arXiv:1910.10699.
    """
    if shortcut not in ("zero_padding", "projection"):
        raise ValueError(f"shortcut must be 'zero_padding' or 'projection', got {shortcut!r}")
    widths = (width, width, 2 * width, 4 * width)
    return _CifarResNet(_blocks_per_stage(depth), num_classes, in_channels, widths, shortcut)


def cifar_resnet_x4(depth: int, num_classes: int, in_channels: int = 3) -> nn.Module:
    """ResNet of ``depth`` = 6n + 2 layers, widths 64, 128, 256, with projection shortcuts.

    Four times the usual width in the stages, but twice (32) in the first convolution, so that the
    first stage has a projection too. Layers, names and initialisation as in ``cifar_resnet``.

    Raises ValueError for another depth.

    Source: Tian, Krishnan & Isola 2020 (CRD), arXiv:1910.10699, resnet8x4 and resnet32x4.
    """
    widths = (32, 64, 128, 256)
    return _CifarResNet(_blocks_per_stage(depth), num_classes, in_channels, widths, "projection")


def _blocks_per_stage(depth: int) -> int:
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
    return (depth - 2) // 6


class _CifarResNet(nn.Module):
    def __init__(
        self,
        blocks: int,
        num_classes: int,
        in_channels: int,
        widths: Sequence[int],
        shortcut: Shortcut,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[1], blocks, shortcut, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, shortcut, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, shortcut, stride=2)
        self.linear = nn.Linear(widths[3], num_classes)
        draw_convolutions(self, fan="fan_out" if shortcut == "projection" else "fan_in")

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        out = F.relu(self.bn1(self.conv1(image)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


class _BasicBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, shortcut: Shortcut, *, stride: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, shortcut, stride=stride)
        self.preactivation = nn.Identity()  # gives the sum a path, so that it can be tapped

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.preactivation(self.bn2(self.conv2(out)) + self.downsample(x)))


class _ZeroPadding(nn.Module):
    """Every second pixel, and as many channels of zeros before as after."""

    def __init__(self, added_channels: int, stride: int) -> None:
        super().__init__()
        self.added_channels = added_channels
        self.stride = stride

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        before = self.added_channels // 2
        padding = (0, 0, 0, 0, before, self.added_channels - before)
        return F.pad(x[:, :, :: self.stride, :: self.stride], padding)


def _shortcut(in_channels: int, out_channels: int, shortcut: Shortcut, *, stride: int) -> nn.Module:
    if in_channels == out_channels:
        return nn.Identity()
    if shortcut == "zero_padding":
        return _ZeroPadding(out_channels - in_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def _stage(
    in_channels: int, out_channels: int, blocks: int, shortcut: Shortcut, *, stride: int
) -> nn.Module:
    first = _BasicBlock(in_channels, out_channels, shortcut, stride=stride)
    return nn.Sequential(
        first,
        *(_BasicBlock(out_channels, out_channels, shortcut, stride=1) for _ in range(blocks - 1)),
    )
