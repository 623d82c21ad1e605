"""Priors on what goes on inside the teacher: its BatchNorm statistics and activations.

All are minimised. The statistics of the pictures are batch moments with the biased variance, while
a network keeps a running mean of unbiased ones: with few pictures the distance has a floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.checks import check_same_shape


class Moments(NamedTuple):
    """Mean and variance of each channel of one layer."""

    mean: Float[Tensor, " c"]
    variance: Float[Tensor, " c"]


def statistics_distance(
    moments: Sequence[Moments], running: Sequence[Moments], *, first_factor: float = 1.0
) -> Float[Tensor, ""]:
    r"""Distance of the pictures' statistics from those that every BatchNorm has kept.

    .. math:: \sum_l \| m_l - M_l \|_2 + \| v_l - V_l \|_2

    Lengths, not their squares; variances, not deviations. The gradient where they are equal is 0.
    ``first_factor`` multiplies the first layer.

    Source: Yin and others 2020 (DeepInversion), arXiv:1912.08795, equation 4; the factor is 10 in
    their code for ImageNet.
    """
    factors = [first_factor, *[1.0] * (len(moments) - 1)]
    lengths: list[Tensor] = [
        factor * torch.linalg.vector_norm(here - there)
        for factor, layer, kept in zip(factors, moments, running, strict=True)
        for here, there in zip(layer, kept, strict=True)
    ]
    return torch.stack(lengths).sum()


def statistics_divergence(
    moments: Sequence[Moments], running: Sequence[Moments], *, eps: float = 1e-5
) -> Float[Tensor, ""]:
    r"""Divergence of the pictures' channels from those of the data, both taken for Gaussian.

    .. math:: \sum_{lc} \mathrm{KL}\big( N(m, v) \,\|\, N(M, V) \big)
        = \sum_{lc} \frac{(m - M)^2 + v}{2 V} - \frac12 \log \frac{v}{V} - \frac12

    ``eps`` is added to both variances: a dead channel has V = 0.

    Source: Choi and others 2020 (DFQ), arXiv:2005.04136, equation 6.
    """
    divergences = []
    for (mean, variance), (kept_mean, kept_variance) in zip(moments, running, strict=True):
        v, kept = variance + eps, kept_variance + eps
        ratio = ((mean - kept_mean).square() + v) / kept
        divergences.append((ratio - (v / kept).log() - 1).sum() / 2)
    return torch.stack(divergences).sum()


class Remembering(nn.Module):
    """A prior that learns or remembers something over rounds of synthesis."""

    def keep(self) -> None:
        """What was seen last belongs to the best pictures of this round so far."""

    def remember(self) -> None:
        """The round is over."""


@final
class AveragedDistance(Remembering):
    r"""``statistics_distance`` of the pictures' statistics averaged with those of earlier rounds.

    .. math:: \sum_l \| (1 - a) m_l + a \hat m_l - M_l \|_2
        + \| (1 - a) v_l + a \hat v_l - V_l \|_2, \quad
        \hat m \leftarrow a \hat m + (1 - a) m

    so that a single batch may be of few classes. The first round has no average and is compared
    alone. The averages, of each round's last pictures, are buffers.

    Source: Fang and others 2022 (FastDFKD), arXiv:2112.15278, section 3.4 and its code.
    """

    def __init__(self, moments: Sequence[Moments], *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self._latest: list[Moments] = []
        self.register_buffer("rounds", torch.tensor(0))
        for layer, held in enumerate(moments):
            for name, values in held._asdict().items():
                self.register_buffer(f"{name}_{layer}", torch.zeros_like(values))

    def forward(self, moments: Sequence[Moments], running: Sequence[Moments]) -> Float[Tensor, ""]:
        self._latest = [Moments(*(value.detach() for value in layer)) for layer in moments]
        if not int(self.get_buffer("rounds")):
            return statistics_distance(moments, running)
        averaged = [
            Moments(*(self._mixed(past, now) for past, now in zip(kept, layer, strict=True)))
            for kept, layer in zip(self.averages, moments, strict=True)
        ]
        return statistics_distance(averaged, running)

    @property
    def averages(self) -> list[Moments]:
        layers = sum(name.startswith("mean_") for name, _ in self.named_buffers())
        return [
            Moments(self.get_buffer(f"mean_{layer}"), self.get_buffer(f"variance_{layer}"))
            for layer in range(layers)
        ]

    def remember(self) -> None:
        if not self._latest:  # a round that was not judged by this prior
            return
        first = not int(self.get_buffer("rounds"))
        for kept, seen in zip(self.averages, self._latest, strict=True):
            for past, now in zip(kept, seen, strict=True):
                past.copy_(now if first else self._mixed(past, now))
        self.get_buffer("rounds").add_(1)
        self._latest = []

    def _mixed(self, past: Tensor, now: Tensor) -> Tensor:
        return self.momentum * past + (1 - self.momentum) * now


def activation(
    feature: Float[Tensor, "b ..."], *, reduction: Literal["mean", "sum"] = "mean"
) -> Float[Tensor, ""]:
    r"""Minus the size of a layer's activations: real pictures excite a network.

    .. math:: -\overline{|f|} \quad\text{or}\quad -\frac1B \sum_b \|f_b\|_1

    as ``reduction`` is "mean" or "sum".

    Source: Chen and others 2019 (DAFL), arXiv:1904.01186, equation 4, of the embedding, with the
    mean of their code; Wang 2021, arXiv:2104.04868, of the last convolution, with the sum.
    """
    if reduction == "sum":
        return -feature.flatten(1).abs().sum(dim=1).mean()
    return -feature.abs().mean()


def record_error(feature: Float[Tensor, "b d"], target: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    r"""Mean squared difference of a layer's positive parts and drawn records of it.

    .. math:: \overline{(\max(0, f) - \max(0, a))^2}

    Source: Lopes, Fenu & Starner 2017, arXiv:1710.07535, section 4, with the ReLUs of their code.
    """
    check_same_shape(feature, target)
    return (F.relu(feature) - F.relu(target)).square().mean()
