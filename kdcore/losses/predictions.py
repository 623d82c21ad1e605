"""Losses on the predictions of a whole batch: rows are samples, columns are classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_same_shape
from kdcore.losses.logits import kd

Temperatures = tuple[float, ...]


def prediction_correlation(
    student: Float[Tensor, "b k"],
    teacher: Float[Tensor, "b k"],
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 4.0,
    eps: float = 1e-8,
) -> Float[Tensor, ""]:
    r"""One minus Pearson's correlation of the predictions, over classes and over samples.

    .. math:: T^2 \Big( \frac{\beta}{B} \sum_b \big( 1 - \rho(q_b, p_b) \big)
        + \frac{\gamma}{K} \sum_k \big( 1 - \rho(q_{\cdot k}, p_{\cdot k}) \big) \Big), \quad
        \rho(u, v) = \frac{\langle \bar u, \bar v \rangle}{\|\bar u\| \|\bar v\| + \epsilon}

    with q and p the softmax of s / T and t / T, and a bar for less the mean. What does not vary
    correlates with nothing, such as the columns of a lone sample; where a student finds all classes
    alike the slope is :math:`1 / \epsilon`.

    Source: Huang and others 2022 (DIST), arXiv:2205.10536, equations 8 to 10, with the factor T^2
    of their code.
    """
    check_same_shape(student, teacher)
    q, p = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    of_samples = 1 - _correlations(q, p, eps).mean()
    of_classes = 1 - _correlations(q.mT, p.mT, eps).mean()
    return temperature**2 * (beta * of_samples + gamma * of_classes)


def multi_level_kd(
    student: Float[Tensor, "b k"],
    teacher: Float[Tensor, "b k"],
    *,
    temperatures: Temperatures = (2.0, 3.0, 4.0, 5.0, 6.0),
    batch_weight: float = 1.0,
    class_weight: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Divergence of the predictions and difference of their Gram matrices, over temperatures.

    .. math:: \sum_T \mathrm{KD}_T + w_b \, \mathrm{BG}_T + w_c \, \mathrm{CG}_T

    with ``kd``, ``batch_gram`` and ``class_gram``.

    Source: Jin, Wang & Lin 2023 (MLKD), Multi-level logit distillation, CVPR, section 3. Their code
    multiplies the sums by masks of confidence that only rescale them, and adds terms of a second,
    strong view of the pictures, of which some are of the first; ours has one view.
    """
    check_same_shape(student, teacher)
    instance = torch.stack([kd(student, teacher, temperature=value) for value in temperatures])
    batch = batch_gram(student, teacher, temperatures=temperatures)
    classes = class_gram(student, teacher, temperatures=temperatures)
    return instance.sum() + batch_weight * batch + class_weight * classes


def batch_gram(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], *, temperatures: Temperatures
) -> Float[Tensor, ""]:
    r"""Squared difference of how alike the predictions of each two samples are.

    .. math:: \sum_T \frac1B \big\| P_T^{} P_T^\top - Q_T^{} Q_T^\top \big\|_F^2

    with :math:`Q_T` and :math:`P_T` the (B, K) softmax of s / T and t / T.
    """
    q, p = (_softened(logits, temperatures) for logits in (student, teacher))
    return (p @ p.mT - q @ q.mT).square().sum() / student.shape[0]


def class_gram(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], *, temperatures: Temperatures
) -> Float[Tensor, ""]:
    r"""Squared difference of how often each two classes are predicted together.

    .. math:: \sum_T \frac1K \big\| P_T^\top P_T^{} - Q_T^\top Q_T^{} \big\|_F^2

    with :math:`Q_T` and :math:`P_T` as in ``batch_gram``. Grows with the square of the batch.
    """
    q, p = (_softened(logits, temperatures) for logits in (student, teacher))
    return (p.mT @ p - q.mT @ q).square().sum() / student.shape[1]


def _softened(logits: Tensor, temperatures: Temperatures) -> Tensor:
    """The predictions at each temperature: (temperatures, B, K)."""
    return torch.stack([F.softmax(logits / value, dim=1) for value in temperatures])


def _correlations(first: Tensor, second: Tensor, eps: float) -> Tensor:
    """Pearson's correlation of each row of one with the same row of the other."""
    first = first - first.mean(dim=1, keepdim=True)
    second = second - second.mean(dim=1, keepdim=True)
    lengths = torch.linalg.vector_norm(first, dim=1) * torch.linalg.vector_norm(second, dim=1)
    correlations: Tensor = (first * second).sum(dim=1) / (lengths + eps)
    return correlations
