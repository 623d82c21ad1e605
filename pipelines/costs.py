"""What a network costs whoever uses it: parameters, operations, time."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# the first passes allocate memory and choose kernels
_WARM_UP, _PASSES = 3, 15


@dataclass(frozen=True)
class Cost:
    """Of one picture through a network in evaluation mode."""

    parameters: int
    flops: int  # a multiplication and its addition are two
    latency_s: float  # median, one picture at a time, on the CPU of this machine


def cost(net: nn.Module, image: Tensor) -> Cost:
    """What ``net``, on the CPU, costs for ``image`` (1, C, H, W).

    Operations are those of convolutions and matrix products, as torch's counter knows them.
    """
    net = net.eval()
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            net(image)
        seconds = [_seconds(net, image) for _ in range(_WARM_UP + _PASSES)]
    return Cost(
        sum(parameter.numel() for parameter in net.parameters()),
        counter.get_total_flops(),
        statistics.median(seconds[_WARM_UP:]),
    )


def _seconds(net: nn.Module, image: Tensor) -> float:
    started = time.perf_counter()
    net(image)
    return time.perf_counter() - started
