"""Wide residual networks, whose BatchNorm and ReLU come before each convolution."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.models.initialisation import draw_convolutions


def wide_resnet(depth: int, widening: int, num_classes: int, in_channels: int = 3) -> nn.Module:
    """WRN-d-k: ``depth`` d = 6n + 4 layers, widths 16k, 32k, 64k for ``widening`` k.

    Layers: ``block1``, ``block2``, ``block3``, each with blocks ``.layer.0`` to ``.layer.n-1``. A
    stage ends in a sum without ReLU. Its BatchNorm and ReLU begin the next stage, so the feature
    before the ReLU is ``block2.layer.0.bn1`` for the first stage, ``block3.layer.0.bn1`` for the
    second and ``bn1`` for the third. Parameter names are those of the checkpoints that circulate.

    Raises ValueError for another depth.

    Source: Zagoruyko & Komodakis 2016, arXiv:1605.07146, table 1, without dropout; initialised by
    fan-out as in their code.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth must be 6n + 4 with n >= 1 (10, 16, 22, ...), got {depth}")
    return _WideResNet((depth - 4) // 6, widening, num_classes, in_channels)


class _WideResNet(nn.Module):
    def __init__(self, blocks: int, widening: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _stage(16, 16 * widening, blocks, stride=1)
        self.block2 = _stage(16 * widening, 32 * widening, blocks, stride=2)
        self.block3 = _stage(32 * widening, 64 * widening, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widening)
        self.fc = nn.Linear(64 * widening, num_classes)
        draw_convolutions(self, fan="fan_out")
        nn.init.zeros_(self.fc.bias)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        out = self.block3(self.block2(self.block1(self.conv1(image))))
        logits: Tensor = self.fc(F.relu(self.bn1(out)).mean(dim=(2, 3)))
        return logits


class _WideBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.widens = in_channels != out_channels
        if self.widens:  # the checkpoints' spelling
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        # a projection reads the activation, an identity what came before it
        return out + (self.convShortcut(active) if self.widens else x)


def _stage(in_channels: int, out_channels: int, blocks: int, *, stride: int) -> nn.Module:
    first = _WideBlock(in_channels, out_channels, stride=stride)
    others = (_WideBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *others)))
