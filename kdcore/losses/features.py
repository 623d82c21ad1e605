"""Losses on one feature of each network, sample by sample."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_same_shape
from kdcore.types import Classifier


def mean_squared_error(
    student: Float[Tensor, "b ..."], teacher: Float[Tensor, "b ..."]
) -> Float[Tensor, ""]:
    r"""Mean squared difference over all elements of the batch.

    .. math:: \frac{1}{BD} \sum_{bd} (s_{bd} - t_{bd})^2
    """
    check_same_shape(student, teacher)
    return (student - teacher).square().mean()


def softmax_regression(
    student: Float[Tensor, "b ..."],
    teacher: Float[Tensor, "b ..."],
    teacher_logits: Float[Tensor, "b k"],
    teacher_classifier: Classifier,
    *,
    feature_weight: float = 1.0,
    classifier_weight: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Mean squared difference of embeddings, and of what the teacher's classifier makes of them.

    .. math:: \frac{1}{BD} \sum_b \| s_b - t_b \|^2
        + \frac{1}{BK} \sum_b \| W_t s_b + b_t - z^t_b \|^2

    Maps and tokens are averaged over positions first. The second part weighs an error of the
    embedding by how much it matters to the teacher's logits.

    Source: Yang and others 2021 (SRRL), Softmax Regression Representation Learning. Their connector
    has BatchNorm and ReLU, and is there for equal widths too.
    """
    here, there = _pooled(student), _pooled(teacher)
    features = mean_squared_error(here, there)
    predicted = here @ teacher_classifier.weight.mT + teacher_classifier.bias
    regression = mean_squared_error(predicted, teacher_logits)
    return feature_weight * features + classifier_weight * regression


def _pooled(feature: Tensor) -> Tensor:
    if feature.ndim == 4:
        return feature.mean(dim=(2, 3))
    return feature.mean(dim=1) if feature.ndim == 3 else feature
