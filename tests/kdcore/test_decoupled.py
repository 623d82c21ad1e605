"""Losses that take the label's class apart, against loops over samples and classes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdcore.losses.class_transport import class_costs, class_transport, other_class_transport
from kdcore.losses.decoupled import decoupled_kd, normalised_kd
from kdcore.losses.logits import kd
from kdcore.losses.temperatures import standardised_kd
from kdcore.types import Classifier

LABEL = torch.tensor([2, 0, 2])


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64) * 2
    return student, teacher


@pytest.fixture
def classifier() -> Classifier:
    weight = torch.randn(4, 6, dtype=torch.float64)
    return Classifier(weight, torch.zeros(4, dtype=torch.float64))


def without(row: Tensor, label: int) -> Tensor:
    return torch.cat([row[:label], row[label + 1 :]])


def test_decoupled_kd_is_kd_where_the_other_classes_count_as_much_as_they_are_likely(
    logits: tuple[Tensor, Tensor],
) -> None:
    student, teacher = logits
    for s, t, y in zip(student, teacher, LABEL, strict=True):
        rest = float(1 - (t / 4).softmax(0)[y])
        value = decoupled_kd(s[None], t[None], y[None], alpha=1.0, beta=rest)
        torch.testing.assert_close(value, kd(s[None], t[None]))


def test_between_two_classes_decoupled_kd_is_kd_whatever_beta() -> None:
    student, teacher = torch.randn(2, 5, 2, dtype=torch.float64)
    label = torch.tensor([0, 1, 1, 0, 1])
    value = decoupled_kd(student, teacher, label, beta=1000.0)
    torch.testing.assert_close(value, kd(student, teacher))


def test_normalised_kd_equals_its_loop(logits: tuple[Tensor, Tensor]) -> None:
    expected = torch.zeros((), dtype=torch.float64)
    for s, t, y in zip(*logits, LABEL.tolist(), strict=True):
        expected -= t.softmax(0)[y] * s.log_softmax(0)[y] / 3
        p, log_q = (without(t, y) / 3).softmax(0), (without(s, y) / 3).log_softmax(0)
        expected -= 2 * 9 * (p * log_q).sum() / 3
    value = normalised_kd(*logits, LABEL, gamma=2.0, temperature=3.0)
    torch.testing.assert_close(value, expected)


def test_transport_between_other_classes_equals_a_loop_that_takes_the_label_out(
    logits: tuple[Tensor, Tensor],
) -> None:
    cost, total = torch.rand(4, 4, dtype=torch.float64), 0.0
    for s, t, y in zip(*logits, LABEL.tolist(), strict=True):
        kept = [k for k in range(4) if k != y]
        c = cost[kept][:, kept] + 1e-8
        gibbs = (-c / 0.1).exp()
        q, p = (without(s, y) / 2).softmax(0), (without(t, y) / 2).softmax(0)
        u = torch.full((3,), 1 / 3, dtype=torch.float64)
        for _ in range(4):
            v = p / (gibbs.T @ u + 1e-8)
            u = q / (gibbs @ v + 1e-8)
        total += float((u[:, None] * gibbs * v * c).sum()) / 3
    options = {"temperature": 2.0, "reg": 0.1, "num_iterations": 4}
    value = other_class_transport(*logits, LABEL, cost, **options)
    torch.testing.assert_close(value, torch.tensor(total, dtype=torch.float64))


def test_class_transport_is_the_label_s_part_and_gamma_times_the_plan_s_cost(
    logits: tuple[Tensor, Tensor], classifier: Classifier
) -> None:
    label_alone = class_transport(*logits, LABEL, classifier, gamma=0.0)
    torch.testing.assert_close(label_alone, normalised_kd(*logits, LABEL, gamma=0.0))
    plan = other_class_transport(
        *logits,
        LABEL,
        class_costs(classifier.weight, similarity="cosine"),
        temperature=6.0,
        reg=0.05,
        num_iterations=10,
    )
    value = class_transport(*logits, LABEL, classifier)
    torch.testing.assert_close(value, label_alone + 200 * plan)


@pytest.mark.parametrize("similarity", ["cosine", "cka"])
def test_classes_with_rows_in_one_direction_cost_nothing(similarity: str) -> None:
    row = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    other = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
    weight = torch.stack([row, 3 * row, other])
    cost = class_costs(weight, similarity=similarity)
    torch.testing.assert_close(cost[0, 1], torch.zeros((), dtype=torch.float64))
    if similarity == "cka":
        expected = 1 - torch.corrcoef(weight)[0, 2] ** 2
    else:
        expected = 1 - row @ other / (row.norm() * other.norm())
    torch.testing.assert_close(cost[0, 2], expected)
    sharp = class_costs(weight, similarity=similarity, sharpness=2.0)
    torch.testing.assert_close(sharp, 1 - (-2 * cost).exp())


def test_class_transport_asks_for_the_teacher_s_classifier(logits: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="needs the teacher's classifier"):
        class_transport(*logits, LABEL, None)


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: standardised_kd(s, t),
        lambda s, t: decoupled_kd(s, t, torch.zeros(3).long()),
        lambda s, t: normalised_kd(s, t, torch.zeros(3).long()),
        lambda s, t: class_transport(
            s, t, torch.zeros(3).long(), Classifier(torch.ones(1, 2), torch.ones(1))
        ),
    ],
)
def test_a_single_class_has_no_others(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="at least two"):
        loss(torch.randn(3, 1), torch.randn(3, 1))
