"""Losses on the logits: of the student alone, or against the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.checks import check_same_shape


def cross_entropy(
    student: Float[Tensor, "b k"], label: Int[Tensor, " b"], *, label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    r"""Mean negative log-likelihood of the labels.

    .. math:: -\frac1B \sum_b \sum_k q_{bk} \log \mathrm{softmax}(s_b)_k, \quad
        q_{bk} = (1 - \epsilon) [k = y_b] + \epsilon / K
    """
    return F.cross_entropy(student, label, label_smoothing=label_smoothing)


def kd(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], *, temperature: float = 4.0
) -> Float[Tensor, ""]:
    r"""Kullback-Leibler divergence from the student's softened prediction to the teacher's.

    .. math:: \frac{T^2}{B} \sum_b \mathrm{KL}\big(
        \mathrm{softmax}(t_b / T) \,\|\, \mathrm{softmax}(s_b / T) \big)

    The factor :math:`T^2` keeps the gradient's size when T changes.

    Source: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2, as a divergence rather than a
    cross-entropy, so that it is zero when both agree.
    """
    check_same_shape(student, teacher)
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2
