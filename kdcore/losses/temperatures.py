"""Losses that are ``kd`` at another temperature: of each sample, of the teacher alone, learned."""

from __future__ import annotations

import math
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.checks import check_num_classes, check_same_shape
from kdcore.losses.logits import divergences, kd
from kdcore.terms import Term, present
from kdcore.types import Batch, Outputs, Probe


def standardised_kd(
    student: Float[Tensor, "b k"],
    teacher: Float[Tensor, "b k"],
    *,
    temperature: float = 2.0,
    correction: int = 1,
    eps: float = 1e-7,
) -> Float[Tensor, ""]:
    r"""Divergence of the softened predictions of standardised logits.

    .. math:: \frac{T^2}{B} \sum_b \mathrm{KL}\big( \mathrm{softmax}(z(t_b) / T) \,\|\,
        \mathrm{softmax}(z(s_b) / T) \big), \quad z(x) = \frac{x - \bar x}{\epsilon + \sigma(x)}

    The student need not have the teacher's scale, only its shape. The standard deviation is divided
    by K - ``correction``. Between two classes every standardised row is the same up to sign, so
    that nothing is left to learn.

    Raises ValueError for a single class.

    Source: Sun and others 2024, arXiv:2403.01427, section 4, with the divisor K - 1 of their code.
    """
    check_same_shape(student, teacher)
    check_num_classes(student)
    here, there = (_standardised(logits, correction, eps) for logits in (student, teacher))
    return kd(here, there, temperature=temperature)


def transformed_teacher(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], *, exponent: float = 0.1
) -> Float[Tensor, ""]:
    r"""Divergence from the student's prediction at temperature 1 to a power of the teacher's.

    .. math:: \frac1B \sum_b \mathrm{KL}(P_b \,\|\, \mathrm{softmax}(s_b)), \quad
        P_{bk} = \frac{p_{bk}^\gamma}{\sum_j p_{bj}^\gamma}, \quad p = \mathrm{softmax}(t)

    The power is a temperature of 1 / ``exponent``, on the teacher alone.

    Source: Zheng & Yang 2024 (TTM), arXiv:2402.11148, section 4; exponent and weight are those of
    their example, VGG13 to VGG8.
    """
    check_same_shape(student, teacher)
    return divergences(student, exponent * teacher).mean()


def weighted_transformed_teacher(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], *, exponent: float = 0.2
) -> Float[Tensor, ""]:
    r"""Divergence to a power of the teacher's prediction, weighed by how unsure the teacher is.

    .. math:: \frac1B \sum_b Z_b \, \mathrm{KL}(P_b \,\|\, \mathrm{softmax}(s_b)), \quad
        Z_b = \sum_k p_{bk}^\gamma

    Z is between 1 and :math:`K^{1 - \gamma}`, so that the loss needs a far smaller weight.

    Source: Zheng & Yang 2024 (WTTM), arXiv:2402.11148, section 5; exponent and weight are those of
    their example with CRD, VGG13 to VGG8.
    """
    check_same_shape(student, teacher)
    log_weight = torch.logsumexp(exponent * F.log_softmax(teacher, dim=1), dim=1)
    return (log_weight.exp() * divergences(student, exponent * teacher)).mean()


@final
class LearnedTemperature(Term):
    r"""``kd`` at a temperature that is trained to make it larger, against the student.

    .. math:: T = T_0 + T_1 \, \sigma(\theta), \quad
        \theta \leftarrow \theta + \eta \lambda \, \partial_\theta \mathcal L, \quad
        \lambda = \tfrac12 \big( 1 - \cos(\pi \min(e / E, 1)) \big)

    with e the epoch and E = ``ramp_epochs``: the adversary grows from nothing to its full strength.
    :math:`\theta` starts at 1 and is a parameter like all others, so that weight decay pulls it
    to the middle of the range.

    Source: Li and others 2023 (CTKD), arXiv:2211.16231, section 3, the global version; their
    epochs are whole numbers from 1 where ours are fractions from 0.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        lowest: float = 1.0,
        span: float = 20.0,
        ramp_epochs: float = 10.0,
    ) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(()))
        self._lowest, self._span, self._ramp_epochs = lowest, span, ramp_epochs

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        there = present(teacher).logits
        check_same_shape(student.logits, there)
        strength = (1 - math.cos(math.pi * min(batch.epoch / self._ramp_epochs, 1))) / 2
        reversed_theta: Tensor = _ReversedGradient.apply(self.theta, strength)
        temperature = self._lowest + self._span * torch.sigmoid(reversed_theta)
        softened = divergences(student.logits / temperature, there / temperature)
        return softened.mean() * temperature**2


class _ReversedGradient(torch.autograd.Function):
    """The identity, whose gradient is turned round and scaled (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def _standardised(logits: Tensor, correction: int, eps: float) -> Tensor:
    variance = logits.var(dim=1, correction=correction, keepdim=True)
    # a row of equal logits has nothing to divide, and a root no slope at zero
    deviation = torch.where(variance > 0, variance, 1.0).sqrt()
    return (logits - logits.mean(dim=1, keepdim=True)) / (eps + deviation)
