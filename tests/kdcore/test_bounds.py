"""The bounds hold on any sample, and their numbers are what they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcore.metrics.bounds import Bounds, lipschitz_constant, risk_bounds
from kdcore.types import Classifier


def measured(seed: int, n: int = 20, d: int = 3, k: int = 4) -> tuple[Bounds, list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    teacher = normal(n, d)
    student = teacher + 0.5 * normal(n, d)
    label = torch.randint(k, (n,), generator=draw)
    heads = Classifier(normal(k, d), normal(k)), Classifier(normal(k, d), normal(k))
    bounds = risk_bounds(student, teacher, label, student_head=heads[0], teacher_head=heads[1])
    return bounds, [student, teacher, label, *heads[0], *heads[1]]


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 6))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_the_gap_of_risks_is_bounded_by_every_side(seed: int, n: int, k: int) -> None:
    bounds, _ = measured(seed, n=n, k=k)
    assert bounds.class_wasserstein_1 <= bounds.paired_l1 + 1e-12
    assert bounds.paired_l1 <= bounds.paired_l2 + 1e-12
    for risks in (bounds.under_student_head, bounds.under_teacher_head):
        assert risks.gap <= risks.lipschitz * bounds.class_wasserstein_1 + 1e-12
    assert bounds.under_student_head.student <= bounds.student_risk_bound + 1e-12
    assert 0 <= bounds.diagonal_plan_mass <= 1 + 1e-12


def test_the_risks_are_those_of_each_head_on_each_network() -> None:
    bounds, (student, teacher, label, *heads) = measured(0)
    for risks, head in (
        (bounds.under_student_head, heads[:2]),
        (bounds.under_teacher_head, heads[2:]),
    ):
        assert risks.student == pytest.approx(
            F.cross_entropy(F.linear(student, *head), label).item()
        )
        assert risks.teacher == pytest.approx(
            F.cross_entropy(F.linear(teacher, *head), label).item()
        )


def test_no_gradient_of_cross_entropy_is_longer_than_the_constant() -> None:
    weight = torch.randn(5, 3, dtype=torch.float64)
    feature = (20 * torch.randn(200, 3, dtype=torch.float64)).requires_grad_()
    label = torch.randint(5, (200,))
    F.cross_entropy(feature @ weight.mT, label, reduction="sum").backward()
    longest = torch.linalg.vector_norm(feature.grad, dim=1).max()
    assert 0.5 * lipschitz_constant(weight) < longest <= lipschitz_constant(weight)


def test_equal_features_have_no_gap_and_keep_their_pairs() -> None:
    _, (student, _, label, *heads) = measured(0)
    bounds = risk_bounds(
        student,
        student,
        label,
        student_head=Classifier(*heads[:2]),
        teacher_head=Classifier(*heads[2:]),
    )
    assert bounds.paired_l2 == bounds.class_wasserstein_1 == bounds.under_student_head.gap == 0
    assert bounds.diagonal_plan_mass == pytest.approx(1)
    assert all(isinstance(number, float) for number in bounds.scalars().values())


@pytest.mark.usefixtures("without_shape_checks")
def test_other_widths_are_refused() -> None:
    head = Classifier(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="same shape"):
        risk_bounds(
            torch.zeros(4, 3),
            torch.zeros(4, 2),
            torch.zeros(4).long(),
            student_head=head,
            teacher_head=head,
        )
