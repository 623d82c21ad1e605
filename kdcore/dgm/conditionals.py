"""Conditional distributions as modules: a network inside, a distribution out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal


class StandardNormal(nn.Module):
    """N(0, I), of one row: the prior that has no parameters."""

    zero: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(*shape), persistent=False)

    def forward(self) -> Normal:
        return Normal(self.zero, torch.ones_like(self.zero), validate_args=False)


class LearnedBernoulli(nn.Module):
    """Independent bits whose logits are parameters, of one row; they start at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(width))

    def forward(self) -> Bernoulli:
        return Bernoulli(logits=self.logits, validate_args=False)


class BernoulliOf(nn.Module):
    """Independent bits with the network's outputs as logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *parents: Tensor) -> Bernoulli:
        return Bernoulli(logits=self.net(torch.cat(parents, dim=-1)), validate_args=False)


class CategoricalOf(nn.Module):
    """One of K classes, with the network's outputs as logits, divided by ``temperature``."""

    def __init__(self, net: nn.Module, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.net, self.temperature = net, temperature

    def forward(self, *parents: Tensor) -> Categorical:
        logits = self.net(torch.cat(parents, dim=-1)) / self.temperature
        return Categorical(logits=logits, validate_args=False)


class NormalOf(nn.Module):
    """A Gaussian with the network's outputs as mean and a fixed standard deviation."""

    def __init__(self, net: nn.Module, *, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, *parents: Tensor) -> Normal:
        mean = self.net(torch.cat(parents, dim=-1))
        return Normal(mean, torch.full_like(mean, self.scale), validate_args=False)
