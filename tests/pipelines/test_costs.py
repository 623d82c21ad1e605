"""What a network costs, against a count by hand."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.costs import cost


def test_parameters_and_operations_are_those_counted_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 5, kernel_size=3, padding=1, bias=False), nn.Flatten(), nn.Linear(5 * 64, 7)
    )
    held = cost(net, torch.zeros(1, 3, 8, 8))
    assert held.parameters == 5 * 3 * 9 + 7 * 5 * 64 + 7
    assert held.flops == 2 * (64 * 5 * 3 * 9 + 7 * 5 * 64)
    assert held.latency_s > 0
    assert not net.training
