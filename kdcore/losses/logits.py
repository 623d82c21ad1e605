"""Losses on the logits: of the student alone, or against the teacher's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.checks import check_same_shape


def cross_entropy(
    student: Float[Tensor, "b k"],
    label: Int[Tensor, " b"] | Float[Tensor, "b k"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    r"""Mean negative log-likelihood of the labels.

    .. math:: -\frac1B \sum_b \sum_k q_{bk} \log \mathrm{softmax}(s_b)_k, \quad
        q_{bk} = (1 - \epsilon) [k = y_b] + \epsilon / K

    Of mixed pictures the label is the share of every class, in the place of :math:`[k = y_b]`.
    With ``label_smoothing`` it is the control of every teacher: soft targets that know nothing.

    Source: Szegedy and others 2016, arXiv:1512.00567, section 7, for the smoothing;
    Zhang and others 2018, arXiv:1710.09412, section 2, for mixed pictures.
    """
    target = label.to(student) if label.is_floating_point() else label
    return F.cross_entropy(student, target, label_smoothing=label_smoothing)


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
    return divergences(student / temperature, teacher / temperature).mean() * temperature**2


def reverse_kd(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], *, temperature: float = 4.0
) -> Float[Tensor, ""]:
    r"""Kullback-Leibler divergence from the teacher's softened prediction to the student's.

    .. math:: \frac{T^2}{B} \sum_b \mathrm{KL}\big(
        \mathrm{softmax}(s_b / T) \,\|\, \mathrm{softmax}(t_b / T) \big)

    Where ``kd`` asks the student to cover all that the teacher thinks likely, this one asks it to
    keep off what the teacher thinks unlikely.

    Source: Gu and others 2024 (MiniLLM), arXiv:2306.08543, section 2, for one prediction rather
    than a sequence, and with the factor of ``kd``.
    """
    check_same_shape(student, teacher)
    return divergences(teacher / temperature, student / temperature).mean() * temperature**2


def jensen_shannon(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    r"""Jensen-Shannon divergence of the softened predictions, in nats: at most log 2.

    .. math:: \frac{1}{2B} \sum_b \mathrm{KL}(p_b \| m_b) + \mathrm{KL}(q_b \| m_b), \quad
        m = \tfrac12 (p + q)

    with p and q the softmax of t / T and s / T. No factor :math:`T^2`: the bound would go.

    Source: Lin 1991, Divergence measures based on the Shannon entropy.
    """
    check_same_shape(student, teacher)
    log_q = F.log_softmax(student / temperature, dim=1)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    both = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return both.sum(dim=1).mean() / 2


def soft_cross_entropy(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], *, temperature: float = 4.0
) -> Float[Tensor, ""]:
    r"""Cross-entropy of the student's softened prediction under the teacher's.

    .. math:: -\frac{T^2}{B} \sum_{bk} \mathrm{softmax}(t_b / T)_k
        \log \mathrm{softmax}(s_b / T)_k

    ``kd`` plus the teacher's entropy: for a fixed teacher the gradients are the same.

    Source: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2.
    """
    check_same_shape(student, teacher)
    log_q = F.log_softmax(student / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    return -(p * log_q).sum(dim=1).mean() * temperature**2


def sparse_kd(
    student: Float[Tensor, "b k"],
    teacher: Float[Tensor, "b k"],
    label: Int[Tensor, " b"],
    *,
    kept: int = 10,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    r"""``kd`` over the teacher's likeliest classes, the label, and all others as one class.

    .. math:: \frac{T^2}{B} \sum_b \sum_{k \in S_b \cup \{\text{rest}\}}
        p_{bk} \log \frac{p_{bk}}{q_{bk}}, \quad p_{b,\text{rest}} = \sum_{k \notin S_b} p_{bk},
        \quad q_{b,\text{rest}} = \sum_{k \notin S_b} q_{bk}

    with p and q the softmax of t / T and s / T and S the teacher's ``kept`` likeliest classes with
    the label: what a cache of ``{top: kept}`` holds. At T = 1 it is the same from there as from all
    logits. The rest has its mass on both sides: without the student's, the loss is least where the
    student says nothing but S. Never above ``kd``, and ``kd`` itself where S has every class.

    Source: Kullback & Leibler 1951, section 4, for the divergence of a coarser partition.
    """
    check_same_shape(student, teacher)
    in_kept = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, label[:, None], True)
    likeliest = teacher.topk(min(kept, teacher.shape[1])).indices
    in_kept = in_kept.scatter(1, likeliest, True)
    log_q, log_p = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    within = (log_p.exp() * (log_p - log_q)).where(in_kept, 0).sum(dim=1)
    rest_q, rest_p = _log_rest(log_q, in_kept), _log_rest(log_p, in_kept)
    return (within + rest_p.exp() * (rest_p - rest_q)).mean() * temperature**2


def divergences(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"]
) -> Float[Tensor, " b"]:
    r"""Kullback-Leibler divergence of each sample's predictions, the teacher's first.

    .. math:: \mathrm{KL}\big( \mathrm{softmax}(t_b) \,\|\, \mathrm{softmax}(s_b) \big)
    """
    log_q, log_p = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def _log_rest(log_probability: Tensor, in_kept: Tensor) -> Tensor:
    # the least number, not minus infinity: where no class is left, nothing minus nothing is no NaN
    least = torch.finfo(log_probability.dtype).min
    return log_probability.masked_fill(in_kept, least).logsumexp(dim=1)
