"""How far matched features bound the difference of risks: both sides of the theorem, measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.checks import check_same_shape
from kdcore.metrics.conditional import class_wasserstein
from kdcore.metrics.kernels import gaussian_mmd
from kdcore.metrics.transport import diagonal_plan_mass
from kdcore.types import Classifier


@dataclass(frozen=True, slots=True)
class Risks:
    """The mean cross-entropy of one head on the features of both networks.

    ``lipschitz`` bounds how much cross-entropy may change per unit of feature, whatever the label.
    """

    student: float
    teacher: float
    lipschitz: float

    @property
    def gap(self) -> float:
        """The left side of the theorem: by how much the two risks differ."""
        return abs(self.student - self.teacher)


@dataclass(frozen=True, slots=True)
class Bounds:
    r"""Both sides of the bounds on one sample, seen by both networks.

    For either head h, with :math:`L_h` its Lipschitz constant and labels shared,

    .. math:: |R_S(h) - R_T(h)| \le L_h \sum_c \tfrac{n_c}{n} W_1(S_c, T_c)
        \le L_h \tfrac1n \sum_i \|s_i - t_i\| \le L_h \Big( \tfrac1n \sum_i \|s_i - t_i\|^2
        \Big)^{1/2}

    where the theorem's right side is the last root without :math:`L_h`, under assumptions on the
    loss that cross-entropy does not meet. Typically ten to thirty times the gap: a trend, not a
    certificate. ``mmd`` is unbiased and may be negative.
    """

    under_student_head: Risks
    under_teacher_head: Risks
    class_wasserstein_1: float
    paired_l1: float
    paired_l2: float
    mmd: float
    diagonal_plan_mass: float

    @property
    def student_risk_bound(self) -> float:
        r"""What the student's own risk cannot exceed.

        .. math:: R_T(h_T) + [R_T(h_S) - R_T(h_T)] + L_{h_S} \, CW_1 \ge R_S(h_S)
        """
        head = self.under_student_head
        return head.teacher + head.lipschitz * self.class_wasserstein_1

    def scalars(self) -> dict[str, float]:
        """Every number under a name of its own, for a log."""
        numbers = {
            "class_wasserstein_1": self.class_wasserstein_1,
            "paired_l1": self.paired_l1,
            "paired_l2": self.paired_l2,
            "mmd": self.mmd,
            "diagonal_plan_mass": self.diagonal_plan_mass,
            "student_risk_bound": self.student_risk_bound,
        }
        heads = {"student_head": self.under_student_head, "teacher_head": self.under_teacher_head}
        for name, risks in heads.items():
            bound = risks.lipschitz * self.class_wasserstein_1
            numbers[f"{name}.student_risk"] = risks.student
            numbers[f"{name}.teacher_risk"] = risks.teacher
            numbers[f"{name}.lipschitz"] = risks.lipschitz
            numbers[f"{name}.gap"] = risks.gap
            numbers[f"{name}.gap_over_bound"] = risks.gap / bound if bound > 0 else 0.0
        return numbers


def lipschitz_constant(weight: Float[Tensor, "k d"]) -> Float[Tensor, ""]:
    r"""The most that cross-entropy of a linear head changes per unit of feature.

    .. math:: L_h = \max_{k,l} \| w_k - w_l \|

    since its gradient is :math:`\sum_k p_k (w_k - w_y)`.
    """
    return torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist").max()


@torch.no_grad()
def risk_bounds(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "n d"],
    label: Int[Tensor, " n"],
    *,
    student_head: Classifier,
    teacher_head: Classifier,
) -> Bounds:
    """Both sides of the bounds for features of the same pictures, best held-out ones.

    Where the widths differ, give the projected features of the student and, as its head, one that
    reads them. A few thousand rows take seconds: the plan behind the diagonal mass is one over all.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, theorem 3.1; the version with labels and a
    linear head, which needs no label to be a function of the features, is this library's.
    """
    check_same_shape(student, teacher)
    lengths = torch.linalg.vector_norm(student - teacher, dim=1)
    by_class = class_wasserstein(student, teacher, label, label, power=1, reduction="frequency")
    return Bounds(
        _risks(student_head, student, teacher, label),
        _risks(teacher_head, student, teacher, label),
        by_class.item(),
        lengths.mean().item(),
        lengths.square().mean().sqrt().item(),
        gaussian_mmd(student, teacher, bandwidth="median", unbiased=True).item(),
        diagonal_plan_mass(student, teacher).item(),
    )


def _risks(head: Classifier, student: Tensor, teacher: Tensor, label: Tensor) -> Risks:
    here, there = (
        F.cross_entropy(F.linear(rows, head.weight, head.bias), label).item()
        for rows in (student, teacher)
    )
    return Risks(here, there, lipschitz_constant(head.weight).item())
