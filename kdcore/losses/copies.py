"""Losses on a map of the student's that is wide enough for several copies of the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.batch_norm import BatchNorm
from kdcore.losses.features import mean_squared_error
from kdcore.losses.maps import Connectors
from kdcore.terms import Term
from kdcore.types import Batch, Outputs, Probe


def copies_distance(
    student: Float[Tensor, "b n_c h w"], teacher: Float[Tensor, "b c h w"], *, copies: int
) -> Float[Tensor, ""]:
    r"""Mean squared difference of the teacher's map and each segment of channels, summed.

    .. math:: \sum_{i=1}^{N} \mathrm{mean} \, (s_i - t)^2, \quad s = [s_1, \dots, s_N]
    """
    segments = student.reshape(len(student), copies, -1, *student.shape[2:])
    repeated = teacher[:, None].expand(-1, copies, -1, -1, -1)
    return copies * mean_squared_error(segments, repeated)


class ManyToOne(Term):
    r"""Mean squared difference of the teacher's map and each of N expansions of the student's.

    .. math:: \sum_l \sum_{i=1}^{N} \mathrm{mean} \, \big( E_l(s_l)_i - t_l \big)^2

    with a linear expansion E of the student's channels to N times the teacher's. As published, E is
    a part of the student (``kdcore.expansion``), which contracts it again for its classifier: name
    the expansion as the student's layer. A layer of any other width is expanded by the term alone;
    then nothing but the loss sees the copies, which do little more than one.

    Source: Liu and others 2023 (NORM), arXiv:2305.13803, with the factor N of their code. They also
    normalise the logits, multiply them by 2.5, and scale the weight over 240 epochs: 0.1 to epoch
    10, 0.5 to 20, 1 to 180, 0.5 to 210, 0.1 to the end.
    """

    def __init__(self, layers: Mapping[str, str], probe: Probe, *, copies: int = 8) -> None:
        super().__init__()
        self.maps = Connectors(layers, probe, partial(_expansion, copies=copies))
        self.copies = copies

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Float[Tensor, ""]:
        pairs = self.maps(student, teacher)
        return torch.stack([copies_distance(*pair, copies=self.copies) for pair in pairs]).sum()


def _expansion(student: Sequence[int], teacher: Sequence[int], *, copies: int) -> nn.Module:
    width = copies * teacher[1]
    if student[1] == width:
        return nn.Identity()
    convolution = nn.Conv2d(student[1], width, kernel_size=1, bias=False)
    return nn.Sequential(convolution, BatchNorm(width))
