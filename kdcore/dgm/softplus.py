"""The logarithm of one plus an exponential, of which divergences of bits are made."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def softplus(x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    r"""The softplus of every number, to the rounding of 1.

    .. math:: \log(1 + e^x) = \max(x, 0) + \log(1 + e^{-|x|})

    What is lost by it is what torch's spends its time on: its ``log1p`` takes eight times as long
    on a CPU as ``log``, so that a picture of bits would cost more to compare than to generate. The
    gradient is exact.
    """
    value: Tensor = _Softplus.apply(x)
    return value


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).add_(x.abs().neg_().exp_().add_(1).log_())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * torch.sigmoid(x)
