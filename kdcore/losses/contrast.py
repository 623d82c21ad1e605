"""Losses that tell a sample's own teacher from those of other samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kdcore.checks import check_same_shape
from kdcore.rows import unit_rows


def in_batch_contrast(
    student: Float[Tensor, "b ..."], teacher: Float[Tensor, "b ..."], *, temperature: float = 0.07
) -> Float[Tensor, ""]:
    r"""How hard it is to find a sample's teacher feature among those of the batch.

    .. math:: -\frac1B \sum_b \log \mathrm{softmax}_j \big( \cos(s_b, t_j) / \tau \big)_b

    Needs no memory, and learns from as many others as the batch has: log B for a student that knows
    nothing, zero for a lone sample. A sample of the same class counts as another.

    Source: van den Oord, Li & Vinyals 2018 (InfoNCE), arXiv:1807.03748, equation 4, with the cosine
    and the temperature of Tian, Krishnan & Isola 2020, arXiv:1910.10699.
    """
    check_same_shape(student, teacher)
    rows = unit_rows(student.flatten(1)), unit_rows(teacher.flatten(1))
    return batch_info_nce(*rows, temperature=temperature)


def batch_info_nce(
    anchor: Float[Tensor, "b d"], positive: Float[Tensor, "b d"], *, temperature: float
) -> Float[Tensor, ""]:
    r"""Cross-entropy of finding each anchor's positive among all positives, by inner products.

    .. math:: -\frac1B \sum_b \log \mathrm{softmax}_j \big( \langle a_b, p_j \rangle / \tau \big)_b
    """
    own = torch.arange(len(anchor), device=anchor.device)
    return F.cross_entropy(anchor @ positive.mT / temperature, own)


def info_nce(
    anchor: Float[Tensor, "b d"],
    positive: Float[Tensor, "b d"],
    negative: Float[Tensor, "m d"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    r"""Cross-entropy of finding each anchor's positive among it and negatives that all share.

    .. math:: -\frac1B \sum_b \log \frac{e^{\langle a_b, p_b \rangle / \tau}}{
        e^{\langle a_b, p_b \rangle / \tau} + \sum_m e^{\langle a_b, n_m \rangle / \tau}}
    """
    own = (anchor * positive).sum(dim=1, keepdim=True)
    scores = torch.cat([own, anchor @ negative.mT], dim=1) / temperature
    return F.cross_entropy(scores, torch.zeros(len(anchor), dtype=torch.int64, device=own.device))


def noise_contrast(
    positive: Float[Tensor, " b"],
    noise: Float[Tensor, "b k"],
    is_noise: Bool[Tensor, "b k"],
    *,
    num_rows: int,
    eps: float = 1e-7,
) -> Float[Tensor, ""]:
    r"""Cross-entropy of telling one positive from its noise by normalised scores.

    .. math:: -\frac1B \sum_b \Big( \log \frac{x_{b0}}{x_{b0} + c_b + \epsilon}
        + \sum_k \log \frac{c_b}{x_{bk} + c_b + \epsilon} \Big), \quad c_b = \frac{K_b}{N}

    Scores are positive; those that are not ``is_noise`` are passed over, and :math:`K_b` counts the
    others. N is the number of rows that the noise is drawn from.

    Source: Tian, Krishnan & Isola 2020 (CRD), arXiv:1910.10699, equation 18, with the
    epsilon of their code.
    """
    share = is_noise.sum(dim=1, keepdim=True).to(noise) / num_rows
    of_positive = positive.log() - (positive + share.squeeze(1) + eps).log()
    of_noise = share.log() - (noise + share + eps).log()
    return -(of_positive + torch.where(is_noise, of_noise, 0.0).sum(dim=1)).mean()
