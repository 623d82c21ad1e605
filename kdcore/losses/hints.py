"""Losses on the teacher's map as predicted from the student's, by a connector that learns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.batch_norm import BatchNorm
from kdcore.checks import check_same_shape
from kdcore.losses.features import mean_squared_error
from kdcore.losses.maps import Connectors
from kdcore.projectors import regressor
from kdcore.reuse import PROJECTOR
from kdcore.terms import Term
from kdcore.types import Batch, Outputs, Probe


def gaussian_nll(
    student: Float[Tensor, "b c h w"],
    teacher: Float[Tensor, "b c h w"],
    spread: Float[Tensor, " c"],
    *,
    eps: float,
) -> Float[Tensor, ""]:
    r"""Negative log-likelihood of the teacher's map, less its constant, per element.

    .. math:: \frac{1}{B C H W} \sum_{bchw} \frac12 \Big( \frac{(s_{bchw} - t_{bchw})^2}{v_c}
        + \log v_c \Big), \quad v_c = \log(1 + e^{\rho_c}) + \epsilon

    with the ``spread`` :math:`\rho`, any real number. Negative where the student predicts well and
    v is small.
    """
    check_same_shape(student, teacher)
    variance = (F.softplus(spread) + eps)[:, None, None]
    return ((student - teacher).square() / variance + variance.log()).mean() / 2


def three_convolutions(student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
    """Three 1x1 convolutions with ReLU between, as wide as the teacher's map."""
    return nn.Sequential(
        nn.Conv2d(student[1], teacher[1], kernel_size=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher[1], teacher[1], kernel_size=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher[1], teacher[1], kernel_size=1, bias=False),
    )


def bottleneck(student: Sequence[int], teacher: Sequence[int], *, reduction: int = 2) -> nn.Module:
    """Convolutions 1x1, 3x3 and 1x1 with BatchNorm and ReLU, narrower inside than the teacher.

    A student's map larger than the teacher's is averaged to its size first, so that the bottleneck
    serves without a teacher's map at hand.
    """
    inner = max(1, teacher[1] // reduction)
    size = (min(student[2], teacher[2]), min(student[3], teacher[3]))
    return nn.Sequential(
        OrderedDict(
            pool=nn.AdaptiveAvgPool2d(size),
            narrow=_normalised(student[1], inner, kernel_size=1),
            within=_normalised(inner, inner, kernel_size=3),
            widen=_normalised(inner, teacher[1], kernel_size=1),
        )
    )


def _normalised(in_channels: int, out_channels: int, *, kernel_size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        BatchNorm(out_channels),
        nn.ReLU(),
    )


class Hints(Term):
    r"""Mean squared difference of the teacher's map and a learned linear map of the student's.

    .. math:: \sum_l \mathrm{mean} \, (r_l(s_l) - t_l)^2

    Source: Romero and others 2015 (FitNets), arXiv:1412.6550, equation 3, trained together with the
    rest rather than before it; the peers' regressor has BatchNorm and ReLU behind it, so that it
    could not predict a map from before the ReLU.
    """

    def __init__(self, layers: Mapping[str, str], probe: Probe) -> None:
        super().__init__()
        self.maps = Connectors(layers, probe, regressor)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Float[Tensor, ""]:
        errors = [mean_squared_error(*pair) for pair in self.maps(student, teacher)]
        return torch.stack(errors).sum()


class VariationalInformation(Term):
    r"""Negative log-likelihood of the teacher's map under a Gaussian predicted from the student's.

    .. math:: \sum_l \mathrm{mean} \, \frac12 \Big( \frac{(m_l(s_l) - t_l)^2}{v_{lc}}
        + \log v_{lc} \Big)

    with a mean of three convolutions and one variance per channel of the teacher, all learned.

    Source: Ahn and others 2019 (VID), arXiv:1904.05835. In one public code the variance is never
    trained, which makes it a mean squared error divided by 10.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        probe: Probe,
        *,
        initial_variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if initial_variance <= eps:
            raise ValueError(f"initial_variance must be above eps {eps}, got {initial_variance}")
        self.maps = Connectors(layers, probe, three_convolutions)
        self.eps = eps
        start = torch.tensor(initial_variance - eps).expm1().log()  # softplus, inverted
        self.spreads = nn.ParameterList(
            start.repeat(pair.teacher_shape[1]) for pair in self.maps.pairs
        )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Float[Tensor, ""]:
        pairs = zip(self.maps(student, teacher), self.spreads, strict=True)
        values = [
            gaussian_nll(here, there, spread, eps=self.eps) for (here, there), spread in pairs
        ]
        return torch.stack(values).sum()


class ReusableMap(Term):
    r"""Mean squared difference of the teacher's last map and a bottleneck of the student's.

    .. math:: \mathrm{mean} \, (P(s) - t)^2

    Behind the bottleneck the student needs no classifier of its own: ``kdcore.reuse`` puts the
    teacher's there, so that cross-entropy has weight 0. The bottleneck P is then a part of the
    student, whose layer "projector" is compared as it is; any other layer has one in this term. It
    ends in a ReLU: the teacher's map must be one from after it. More pairs are summed.

    Source: Chen and others 2022 (SimKD), arXiv:2203.14001.
    """

    def __init__(self, layers: Mapping[str, str], probe: Probe, *, reduction: int = 2) -> None:
        super().__init__()
        self.maps = Connectors(layers, probe, partial(bottleneck, reduction=reduction))
        for place, pair in enumerate(self.maps.pairs):
            if pair.student == PROJECTOR:
                self.maps.connectors[place] = nn.Identity()

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Float[Tensor, ""]:
        errors = [mean_squared_error(*pair) for pair in self.maps(student, teacher)]
        return torch.stack(errors).sum()
