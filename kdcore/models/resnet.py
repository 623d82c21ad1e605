"""The residual networks of the CIFAR experiments, with shortcuts that have no parameters."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def cifar_resnet(
    depth: int, num_classes: int, in_channels: int = 3, *, width: int = 16
) -> nn.Module:
    """ResNet of ``depth`` = 6n + 2 layers for small pictures, widths w, 2w, 4w.

    Layers: ``layer1``, ``layer2``, ``layer3``, each with blocks ``.0`` to ``.n-1``. A block's sum
    before its last ReLU is its ``.preactivation``: of ResNet-20's second stage,
    ``layer2.2.preactivation``. Parameter names are those of the checkpoints that circulate for
    CIFAR-10.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2, with shortcut option A.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
    return _CifarResNet((depth - 2) // 6, num_classes, in_channels, width)


class _CifarResNet(nn.Module):
    def __init__(self, blocks: int, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        out = F.relu(self.bn1(self.conv1(image)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.preactivation = nn.Identity()  # gives the sum a path, so that it can be tapped
        self.stride = stride
        self.added_channels = out_channels - in_channels

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.preactivation(self.bn2(self.conv2(out)) + self._shortcut(x)))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.added_channels == 0:
            return x
        before = self.added_channels // 2
        padding = (0, 0, 0, 0, before, self.added_channels - before)
        return F.pad(x[:, :, :: self.stride, :: self.stride], padding)


def _stage(in_channels: int, out_channels: int, blocks: int, *, stride: int) -> nn.Module:
    first = _BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(
        first, *(_BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
    )
