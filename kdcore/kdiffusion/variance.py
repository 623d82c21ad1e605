"""The variance with which every step predicts the teacher's feature."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.kdiffusion.likelihood import Spread

Variance = Literal["learned", "fixed", "l2"]

_SMALLEST = 1e-5  # of a learned variance, as in VID


class PredictedVariance(nn.Module):
    r"""V of each step and channel, where the student's variance is :math:`\sigma^2`.

    .. math:: V = \pi \sigma^2 + \gamma \, (\mathrm{softplus}(\rho) + 10^{-5})

    with the prior and the gain of a ``Spread``, if "learned"; :math:`\max(\pi, \text{floor}) \,
    \sigma^2` if "fixed", since the prior of the last step is zero; 1 if "l2".

    The learned form is the noise of the posterior with an uncertain clean sample integrated out.

    Source: the parametrisation is Ahn et al. 2019 (VID), arXiv:1904.05835, section 3.
    """

    def __init__(
        self, kind: Variance, num_steps: int, width: int, *, initial: float, floor: float
    ) -> None:
        super().__init__()
        if initial <= 0:
            raise ValueError(f"a variance starts above 0, got {initial}")
        self._kind, self._floor = kind, floor
        rho = torch.full((num_steps, width), math.log(math.expm1(initial)))
        self.rho = nn.Parameter(rho) if kind == "learned" else None

    def forward(self, spread: Spread, student: Float[Tensor, " c"]) -> Float[Tensor, "m c"]:
        if self.rho is not None:
            learned = F.softplus(self.rho) + _SMALLEST
            return spread.prior[:, None] * student + spread.gain[:, None] * learned
        if self._kind == "fixed":
            return spread.prior.clamp(min=self._floor)[:, None] * student
        return spread.prior.new_ones(len(spread.prior), len(student))
