"""Losses on the logits that treat the label's class and the other classes apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.checks import check_num_classes, check_same_shape
from kdcore.losses.logits import divergences


def decoupled_kd(
    student: Float[Tensor, "b k"],
    teacher: Float[Tensor, "b k"],
    label: Int[Tensor, " b"],
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    r"""``kd`` in two parts: how likely the label is, and how the rest is shared by other classes.

    .. math:: \frac{T^2}{B} \sum_b \alpha \, \mathrm{KL}\big( (p_y, 1 - p_y) \| (q_y, 1 - q_y) \big)
        + \beta \, \mathrm{KL}(\tilde p \| \tilde q)

    with p and q the softmax of t / T and s / T, :math:`\tilde p` and :math:`\tilde q` the same
    over the classes other than y. ``kd`` is alpha = 1 and beta = 1 - p_y of each sample: there a
    teacher that is sure teaches nothing about the others. Between two classes the second part is 0.

    Raises ValueError for a single class.

    Source: Zhao and others 2022 (DKD), arXiv:2203.08679, equation 7. Their code masks the label by
    -1000 and takes the logarithm of a sum, which is infinite for a student that is sure.
    """
    check_same_shape(student, teacher)
    check_num_classes(student)
    return decoupled_divergences(
        student / temperature, teacher / temperature, label, alpha=alpha, beta=beta
    ).mean() * (temperature**2)


def normalised_kd(
    student: Float[Tensor, "b k"],
    teacher: Float[Tensor, "b k"],
    label: Int[Tensor, " b"],
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Cross-entropy of the label weighed by the teacher, and that of the other classes.

    .. math:: -\frac1B \sum_b p_y \log q_y
        - \frac{\gamma T^2}{B} \sum_b \sum_{k \ne y} \tilde p_k \log \tilde q_k

    with p and q at temperature 1, :math:`\tilde p` and :math:`\tilde q` at temperature T over the
    classes other than y. Not zero where both agree.

    Raises ValueError for a single class.

    Source: Yang and others 2023 (NKD), arXiv:2303.13005, section 3. One version of their code
    leaves the label among the others.
    """
    check_same_shape(student, teacher)
    check_num_classes(student)
    log_q = F.log_softmax(_others(student, label) / temperature, dim=1)
    p = F.softmax(_others(teacher, label) / temperature, dim=1)
    others = -(p * log_q).sum(dim=1).mean()
    return label_cross_entropy(student, teacher, label) + gamma * temperature**2 * others


def decoupled_divergences(
    student: Float[Tensor, "b k"],
    teacher: Float[Tensor, "b k"],
    label: Int[Tensor, " b"],
    *,
    alpha: float,
    beta: float,
) -> Float[Tensor, " b"]:
    """The two parts of ``decoupled_kd`` of each sample, weighed, at temperature 1."""
    binary = F.kl_div(
        _label_and_rest(student, label),
        _label_and_rest(teacher, label),
        reduction="none",
        log_target=True,
    )
    others = divergences(_others(student, label), _others(teacher, label))
    return alpha * binary.sum(dim=1) + beta * others


def label_cross_entropy(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], label: Int[Tensor, " b"]
) -> Float[Tensor, ""]:
    r"""Cross-entropy of the label, weighed by the teacher's probability of it: -p_y log q_y."""
    log_q = F.log_softmax(student, dim=1).gather(1, label[:, None])
    p = F.softmax(teacher, dim=1).gather(1, label[:, None])
    return -(p * log_q).mean()


def _others(logits: Tensor, label: Tensor) -> Tensor:
    """The logits of the classes other than the label: one column less."""
    # by gathering, not by a mask: the number of columns must not depend on values
    column = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, column + (column >= label[:, None]))


def _label_and_rest(logits: Tensor, label: Tensor) -> Tensor:
    """Log-probabilities of the label and of all other classes together, finite however sure."""
    total = logits.logsumexp(dim=1)
    of_label = logits.gather(1, label[:, None]).squeeze(1) - total
    return torch.stack([of_label, _others(logits, label).logsumexp(dim=1) - total], dim=1)
