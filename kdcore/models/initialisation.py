"""The first weights of the networks, drawn as their sources draw them."""

from __future__ import annotations

from typing import Literal

from torch import nn


def draw_convolutions(net: nn.Module, *, fan: Literal["fan_in", "fan_out"]) -> None:
    r"""Draw every convolution's weights from a Gaussian that keeps the variance through ReLUs.

    .. math:: w \sim N(0, 2 / n), \quad n = k^2 c_{in} \text{ or } k^2 c_{out}

    Biases become zero. ``fan_in`` keeps the variance of what goes forward, ``fan_out`` that of the
    gradients; a depthwise convolution's ``fan_out`` counts all channels, as the sources do.

    Source: He et al. 2015, arXiv:1502.01852, equations 10 and 14.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def draw_classifier(linear: nn.Linear) -> None:
    """Draw a classifier's weights with standard deviation 0.01; its bias becomes zero.

    Source: the code of Tian, Krishnan & Isola 2020 (CRD), arXiv:1910.10699, VGG and MobileNetV2.
    """
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
