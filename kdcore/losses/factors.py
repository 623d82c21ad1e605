"""Losses on what is left of a map when it is squeezed until it can just be made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.checks import check_same_shape
from kdcore.losses.maps import Connectors
from kdcore.terms import Term
from kdcore.types import Batch, Outputs, Probe


def factor_distance(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    r"""Mean absolute difference of maps of unit length.

    .. math:: \frac{1}{B C H W} \sum_b \Big\| \frac{s_b}{\|s_b\|} - \frac{t_b}{\|t_b\|} \Big\|_1
    """
    check_same_shape(student, teacher)
    return F.l1_loss(F.normalize(student.flatten(1)), F.normalize(teacher.flatten(1)))


class FactorTransfer(Term):
    r"""Mean absolute difference of the teacher's factors and the student's, of unit length.

    .. math:: \sum_l d\big( T_l(s_l), P_l(t_l) \big) + \lambda \, \mathrm{mean} \,
        \big| D_l(P_l(t_l)) - t_l \big|

    with d the ``factor_distance``. Paraphraser P and its decoder D learn from the second part
    alone, without labels; to the translator T and the student the factors are a constant. The
    default :math:`\lambda` undoes the weight of 500.

    The published paraphraser is trained first, for 5 epochs, and then held. Here it learns beside
    the student, so that a run has one stage and may come from a cache; for the first
    ``paraphraser_epochs`` it learns alone.

    Source: Kim, Park & Kwak 2018 (FT), arXiv:1802.04977, section 3, with their code's absolute
    differences and weight; a public code that is often quoted compares attention maps of factors.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        probe: Probe,
        *,
        rate: float = 0.5,
        reconstruction_weight: float = 1 / 500,
        paraphraser_epochs: float = 0.0,
    ) -> None:
        super().__init__()
        self.maps = Connectors(layers, probe, partial(_translator, rate=rate))
        self.paraphrasers = nn.ModuleList(
            _Paraphraser(pair.teacher_shape[1], rate) for pair in self.maps.pairs
        )
        self.reconstruction_weight = reconstruction_weight
        self.paraphraser_epochs = paraphraser_epochs

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Float[Tensor, ""]:
        distances, errors = [], []
        for (here, there), paraphraser in zip(
            self.maps(student, teacher), self.paraphrasers, strict=True
        ):
            factor, remade = paraphraser(there)
            # cut: else the paraphraser would move towards the student, at best to a constant
            distances.append(factor_distance(here, factor.detach()))
            errors.append(F.l1_loss(remade, there))
        # weight 0 and not left out: under DDP every parameter needs a gradient in every step
        started = float(batch.epoch >= self.paraphraser_epochs)
        distance, error = torch.stack(distances).sum(), torch.stack(errors).sum()
        return started * distance + self.reconstruction_weight * error


class _Paraphraser(nn.Module):
    """Three convolutions to the factor and three back."""

    def __init__(self, channels: int, rate: float) -> None:
        super().__init__()
        width = _width(channels, rate)
        self.encode = _three_convolutions(channels, channels, width, width)
        self.decode = _three_convolutions(width, width, channels, channels)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.encode(maps)
        return factor, self.decode(factor)


def _translator(student: Sequence[int], teacher: Sequence[int], *, rate: float) -> nn.Module:
    width = _width(teacher[1], rate)
    return _three_convolutions(student[1], student[1], width, width)


def _width(channels: int, rate: float) -> int:
    return max(1, round(channels * rate))


def _three_convolutions(*channels: int) -> nn.Module:
    steps: list[nn.Module] = []
    for before, after in pairwise(channels):
        steps += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*steps)
