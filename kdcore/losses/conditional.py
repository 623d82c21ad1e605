"""Losses on the distribution of a feature within classes, or of features and labels together.

Distances are squared, and in units of the teacher's total variance unless ``normalise="none"``.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from kdcore.losses.samples import (
    Labels,
    Normalise,
    Positions,
    class_per_sample,
    paired_samples,
    per_sample,
)
from kdcore.metrics.conditional import (
    LabelCost,
    class_wasserstein,
    joint_wasserstein,
    label_costs,
)

BatchReduction = Literal["sum", "mean_present", "frequency"]


def conditional_wasserstein(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "n ..."],
    label: Int[Tensor, " n"],
    teacher_logits: Float[Tensor, "n k"],
    *,
    labels: Labels = "true",
    reduction: BatchReduction = "frequency",
    normalise: Normalise = "variance",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance between the features of each class.

    .. math:: \frac1v \sum_c w_c \, W_2^2(S_c, T_c)

    with :math:`w_c` 1, 1 / present classes or the class's share of the batch, classes by the true
    labels or by the teacher's predictions. With few samples per class it is nearly the mean squared
    distance of the pairs.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, the row CW2(E); its code takes the sum, which
    at one weight is stronger by the number of classes.
    """
    rows = paired_samples(student, teacher, normalise=normalise, positions=positions)
    classes = class_per_sample(label, teacher_logits, student, labels=labels, positions=positions)
    return class_wasserstein(*rows, classes, classes, reduction=reduction)


def joint_distribution_wasserstein(
    student: Float[Tensor, "n ..."],
    teacher: Float[Tensor, "n ..."],
    label: Int[Tensor, " n"],
    student_logits: Float[Tensor, "n k"],
    teacher_logits: Float[Tensor, "n l"],
    *,
    labels: Labels = "true",
    label_cost: LabelCost = "onehot",
    beta: float | Literal["max"] = 1.0,
    normalise: Normalise = "variance",
    positions: Positions = "pool",
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance between features and labels together.

    .. math:: \min_{\gamma \in \Gamma(1/n, 1/n)} \sum_{ij} \gamma_{ij} \big(
        \tfrac1v \| s_i - t_j \|^2 + \beta \, L_{ij} \big)

    ``label_cost`` is one-hot on the true labels or the teacher's predictions, or compares what both
    networks say and then trains the classifier too; ``beta="max"`` is the largest squared distance
    of features. As beta grows the one-hot form becomes ``cw2`` with reduction "frequency".

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, the row JW2(E), whose code compares the student
    with itself; after Courty and others 2017 (JDOT), arXiv:1705.08848.
    """
    rows = paired_samples(student, teacher, normalise=normalise, positions=positions)
    classes = class_per_sample(label, teacher_logits, student, labels=labels, positions=positions)
    here = per_sample(student_logits, student, positions)
    there = per_sample(teacher_logits, student, positions)
    cost = label_costs(here, there, classes, classes, kind=label_cost)
    return joint_wasserstein(*rows, cost, beta=beta)
