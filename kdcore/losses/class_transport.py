"""A loss on the logits that knows which classes are alike."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.checks import check_num_classes, check_same_shape
from kdcore.losses.decoupled import label_cross_entropy
from kdcore.types import Classifier

Similarity = Literal["cosine", "cka"]
_FLOOR = 1e-8  # of costs and of the sums that are divided by, in the published iteration


def class_transport(
    student: Float[Tensor, "b k"],
    teacher: Float[Tensor, "b k"],
    label: Int[Tensor, " b"],
    teacher_classifier: Classifier | None,
    *,
    gamma: float = 200.0,
    temperature: float = 6.0,
    reg: float = 0.05,
    num_iterations: int = 10,
    similarity: Similarity = "cosine",
    sharpness: float = 0.0,
) -> Float[Tensor, ""]:
    r"""Cross-entropy of the label weighed by the teacher, and transport between other classes.

    .. math:: -\frac1B \sum_b p_y \log q_y + \frac{\gamma}{B} \sum_b
        W_\epsilon(\tilde q_b, \tilde p_b)

    W is ``other_class_transport``; moving mass costs little between classes that the teacher's
    classifier thinks alike (``class_costs``).

    Raises ValueError for a single class, and without the teacher's classifier.

    Source: Lv and others 2024 (WKD-L), arXiv:2412.08139, section 3.1, with the weights for
    WRN-40-2 to ShuffleNetV1. Their CKA is of the pictures' features, ours of the classifier's rows.
    """
    check_same_shape(student, teacher)
    check_num_classes(student)
    if teacher_classifier is None:
        raise ValueError("this loss needs the teacher's classifier, and its outputs carry none")
    cost = class_costs(teacher_classifier.weight, similarity=similarity, sharpness=sharpness)
    transport = other_class_transport(
        student,
        teacher,
        label,
        cost,
        temperature=temperature,
        reg=reg,
        num_iterations=num_iterations,
    )
    return label_cross_entropy(student, teacher, label) + gamma * transport


def other_class_transport(
    student: Float[Tensor, "b k"],
    teacher: Float[Tensor, "b k"],
    label: Int[Tensor, " b"],
    cost: Float[Tensor, "k k"],
    *,
    temperature: float,
    reg: float,
    num_iterations: int,
) -> Float[Tensor, ""]:
    r"""Mean cost of an entropic plan between the predictions over the classes other than y.

    .. math:: \frac1B \sum_b \sum_{ij} u_i G_{ij} v_j C_{ij}, \quad G = e^{-C / \epsilon}, \quad
        v \leftarrow \frac{\tilde p}{G^\top u + \delta}, \quad
        u \leftarrow \frac{\tilde q}{G v + \delta}

    from u = 1 / (K - 1), with C the cost, at least :math:`\delta = 10^{-8}`. The number of
    iterations is part of the value, which is not that of the optimal plan.

    Source: Lv and others 2024 (WKD-L), arXiv:2412.08139. Their code copies the cost without row and
    column y for every sample; masses of zero there need one K x K matrix for all.
    """
    is_label = F.one_hot(label, student.shape[1]).bool()
    q = F.softmax((student / temperature).masked_fill(is_label, -torch.inf), dim=1)
    p = F.softmax((teacher / temperature).masked_fill(is_label, -torch.inf), dim=1)
    cost = cost.clamp(min=0) + _FLOOR
    kernel = (-cost / reg).exp()
    u = (~is_label).to(q) / (student.shape[1] - 1)
    for _ in range(num_iterations):
        v = p / (u @ kernel + _FLOOR)
        u = q / (v @ kernel.mT + _FLOOR)
    return ((u @ (kernel * cost)) * v).sum(dim=1).mean()


def class_costs(
    weight: Float[Tensor, "k d"], *, similarity: Similarity, sharpness: float = 0.0
) -> Float[Tensor, "k k"]:
    r"""How unlike two classes are to a classifier: 1 less the similarity of their rows.

    .. math:: C_{ij} = 1 - \cos(w_i, w_j) \quad \text{or} \quad
        1 - \cos^2(w_i - \bar w_i, w_j - \bar w_j)

    The second is the centred kernel alignment of two features of one dimension. A ``sharpness``
    other than 0 makes :math:`1 - e^{-\kappa C}` of the cost.
    """
    if similarity == "cka":
        weight = weight - weight.mean(dim=1, keepdim=True)
    rows = F.normalize(weight, dim=1)
    alike = rows @ rows.mT
    cost = 1 - (alike.square() if similarity == "cka" else alike)
    return 1 - (-sharpness * cost).exp() if sharpness else cost
