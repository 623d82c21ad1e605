"""Losses on maps from before a ReLU: which neurons are on, and how far where they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.checks import check_same_shape
from kdcore.losses.maps import Connectors
from kdcore.rows import gather_rows
from kdcore.terms import Term
from kdcore.types import Batch, Outputs, Probe


def activation_boundary(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"], *, margin: float = 1.0
) -> Float[Tensor, ""]:
    r"""Squared hinge on the sign of each of the teacher's neurons, summed over a picture.

    .. math:: \frac1B \sum_{bchw} \max(0, m - \rho(t_{bchw}) \, s_{bchw})^2, \quad
        \rho(t) = 1 \text{ if } t > 0, \text{ else } -1

    It has no gradient to the teacher, whose signs alone count.
    """
    check_same_shape(student, teacher)
    sign = torch.where(teacher > 0, 1.0, -1.0).to(student)
    return (margin - sign * student).clamp(min=0).square().sum(dim=(1, 2, 3)).mean()


def partial_distance(
    student: Float[Tensor, "b c h w"],
    teacher: Float[Tensor, "b c h w"],
    margin: Float[Tensor, " c"],
) -> Float[Tensor, ""]:
    r"""Squared distance to the teacher's margin ReLU, where the student is not low enough already.

    .. math:: \frac1B \sum_{bchw} \begin{cases} 0 & s \le \hat t \le 0 \\
        (s - \hat t)^2 & \text{else} \end{cases}, \quad \hat t = \max(t, m_c)

    summed over a picture, with a margin :math:`m_c \le 0` for each channel.
    """
    check_same_shape(student, teacher)
    target = torch.maximum(teacher, margin[:, None, None])
    low_enough = (student <= target) & (target <= 0)
    squared = torch.where(low_enough, 0.0, (student - target).square())
    return squared.sum(dim=(1, 2, 3)).mean()


def gaussian_margin(weight: Float[Tensor, " c"], bias: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    r"""Mean negative response of a channel behind BatchNorm, if its responses are Gaussian.

    .. math:: m = b - s \, \frac{\phi(b / s)}{\Phi(-b / s)}, \quad s = |w|

    or -3 s where fewer than one response in a thousand is negative.

    Source: the code of Heo and others 2019 (OFD), arXiv:1904.01866.
    """
    spread = weight.abs()
    ratio = bias / spread
    share = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    return torch.where(share > 0.001, bias - spread * density / share, -3 * spread)


def halving_sum(values: Sequence[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    r"""The deepest layer's value, and each before it half as heavy as the next.

    .. math:: \sum_{l=1}^{L} 2^{l - L} v_l
    """
    deepest_first = enumerate(reversed(values))
    return torch.stack([value / 2**above for above, value in deepest_first]).sum()


class ActivationBoundaries(Term):
    r"""Squared hinge on whether each neuron is on as the teacher's is, on maps from before a ReLU.

    .. math:: \sum_l \frac{2^{l - L}}{B} \sum_{bchw} \max\big(0, m - \rho(t_l) \, s_l \big)^2

    with the teacher's sign :math:`\rho`, so that no gradient leads to the teacher. Name layers from
    before the activation: after a ReLU no neuron is below its boundary.

    Source: Heo and others 2019 (AB), arXiv:1811.03233, section 3. They train with it before the
    labels, through connectors with BatchNorm; the weight 3 / 1000 is their code's.
    """

    def __init__(self, layers: Mapping[str, str], probe: Probe, *, margin: float = 1.0) -> None:
        super().__init__()
        self.maps = Connectors(layers, probe)
        self.margin = margin

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Float[Tensor, ""]:
        pairs = self.maps(student, teacher)
        return halving_sum([activation_boundary(*pair, margin=self.margin) for pair in pairs])


class MarginRelu(Term):
    r"""Squared distance to the teacher's margin ReLU, where the student is not low enough already.

    .. math:: \sum_l \frac{2^{l - L}}{B} \sum_{bchw} [\, s_l > \hat t_l \text{ or } \hat t_l > 0 \,]
        \, (s_l - \hat t_l)^2, \quad \hat t = \max(t, m_c)

    on maps from before a ReLU. The margin :math:`m_c` is the mean negative response of the
    teacher's channel over all pictures so far, on all workers: that is its definition, and it can
    be had from a cache, where the teacher's BatchNorm cannot.

    Source: Heo and others 2019 (OFD), arXiv:1904.01866, section 3. Their code derives the
    margin from the teacher's BatchNorm (``gaussian_margin``), which it keeps in training mode, and
    their connectors have BatchNorm.
    """

    def __init__(self, layers: Mapping[str, str], probe: Probe) -> None:
        super().__init__()
        self.maps = Connectors(layers, probe)
        self.margins = nn.ModuleList(
            _NegativeMean(pair.teacher_shape[1]) for pair in self.maps.pairs
        )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Float[Tensor, ""]:
        pairs = zip(self.maps(student, teacher), self.margins, strict=True)
        return halving_sum(
            [partial_distance(here, there, margin(there)) for (here, there), margin in pairs]
        )


class _NegativeMean(nn.Module):
    """The mean negative response of each channel so far; 0 where there was none."""

    mean: Tensor
    count: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("count", torch.zeros(channels, dtype=torch.int64))

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, " c"]:
        if self.training:
            self._remember(maps)
        return self.mean.clone()  # the next batch changes it in place

    @torch.no_grad()
    def _remember(self, maps: Tensor) -> None:
        sums = torch.stack([maps.clamp(max=0).sum(dim=(0, 2, 3)), (maps < 0).sum(dim=(0, 2, 3))])
        total, number = gather_rows(sums[None]).sum(dim=0)
        self.count += number.long()
        self.mean += (total - number * self.mean) / self.count.clamp(min=1)
