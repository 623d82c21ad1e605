"""Losses on relations between samples or channels, against loops; what each of them ignores."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import exp, log

import pytest
import torch
from torch import Tensor

from kdcore.losses.correlations import (
    channel_correlation,
    consecutive_correlation,
    kernel_correlation,
)
from kdcore.losses.relations import (
    angle_relation,
    distance_relation,
    relational_kd,
    similarity_divergence,
    similarity_preservation,
)

Pair = tuple[Tensor, Tensor]
Relation = Callable[[Tensor, Tensor], Tensor]
RELATIONS: list[Relation] = [
    distance_relation,
    angle_relation,
    similarity_divergence,
    similarity_preservation,
    kernel_correlation,
]


@pytest.fixture
def rows() -> Pair:
    """Four samples of two networks of different widths."""
    return torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_distance_relation_equals_its_loop(rows: Pair) -> None:
    def relative(x: Tensor) -> list[list[float]]:
        apart = [[float((a - b).norm()) for b in x] for a in x]
        mean = sum(map(sum, apart)) / 12
        return [[value / mean for value in row] for row in apart]

    here, there = map(relative, rows)
    pairs = product(range(4), range(4))
    expected = sum(huber(here[i][j] - there[i][j]) for i, j in pairs) / 16
    torch.testing.assert_close(distance_relation(*rows), scalar(expected))


def test_angle_relation_equals_its_loop(rows: Pair) -> None:
    def cosine(x: Tensor, i: int, j: int, k: int) -> float:
        first, second = x[j] - x[i], x[k] - x[i]
        lengths = float(first.norm() * second.norm())
        return float(first @ second) / lengths if lengths else 0.0

    triples = product(range(4), repeat=3)
    expected = sum(huber(cosine(rows[0], *at) - cosine(rows[1], *at)) for at in triples) / 64
    torch.testing.assert_close(angle_relation(*rows), scalar(expected))


def test_relational_kd_weighs_distances_25_and_angles_50(rows: Pair) -> None:
    expected = 25 * distance_relation(*rows) + 50 * angle_relation(*rows)
    torch.testing.assert_close(relational_kd(*rows), expected)


def test_similarity_divergence_equals_its_loop(rows: Pair) -> None:
    def shares(x: Tensor) -> list[list[float]]:
        kernel = [[float(1 + torch.cosine_similarity(a, b, dim=0)) / 2 for b in x] for a in x]
        return [[value / sum(row) for value in row] for row in kernel]

    q, p = map(shares, rows)
    expected = sum(p[i][j] * log(p[i][j] / q[i][j]) for i, j in product(range(4), range(4)))
    value = similarity_divergence(*rows, eps=0.0)
    torch.testing.assert_close(value, scalar(expected / 16))
    batchmean = similarity_divergence(*rows, eps=0.0, reduction="batchmean")
    torch.testing.assert_close(batchmean, scalar(expected / 4))


def test_similarity_preservation_equals_its_loop(rows: Pair) -> None:
    def unit(x: Tensor) -> list[Tensor]:
        return [x @ row / (x @ row).norm() for row in x]

    differences = [(a - b).square().sum() for a, b in zip(*map(unit, rows), strict=True)]
    expected = torch.stack(differences).sum() / 16
    torch.testing.assert_close(similarity_preservation(*rows), expected)


def test_kernel_correlation_comes_to_that_of_a_gaussian_kernel(rows: Pair) -> None:
    def kernel(x: Tensor) -> Tensor:
        unit = [row / row.norm() for row in x]
        squared = [[float((a - b).square().sum()) for b in unit] for a in unit]
        return torch.tensor([[exp(-0.4 * value) for value in row] for row in squared])

    expected = (kernel(rows[0]) - kernel(rows[1])).double()
    value = kernel_correlation(*rows, degree=20)
    torch.testing.assert_close(value, expected.norm() / 16, rtol=1e-6, atol=1e-8)
    squared = kernel_correlation(*rows, degree=20, reduction="mean_square")
    torch.testing.assert_close(squared, expected.square().mean(), rtol=1e-5, atol=1e-8)


def test_consecutive_correlation_equals_its_loop() -> None:
    student, teacher = torch.randn(2, 4, 3, dtype=torch.float64)
    apart = (student - teacher).abs()
    expected = sum(apart[i] @ apart[i + 1] for i in range(3)) / 3
    torch.testing.assert_close(consecutive_correlation(student, teacher), expected)


def test_channel_correlation_equals_its_loop() -> None:
    student, teacher = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student.flatten(2), teacher.flatten(2), strict=True):
        for i in range(3):
            here, there = s @ s[i], t @ t[i]
            expected += (here / here.norm() - there / there.norm()).square().sum() / 6
    torch.testing.assert_close(channel_correlation(student, teacher), expected)


@pytest.mark.usefixtures("without_shape_checks")
def test_channel_correlation_asks_for_maps() -> None:
    with pytest.raises(ValueError, match="compares maps"):
        channel_correlation(torch.randn(4, 3), torch.randn(4, 3))


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_does_not_change_when_the_student_s_space_is_turned(
    relation: Relation, rows: Pair
) -> None:
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    torch.testing.assert_close(relation(rows[0] @ turn, rows[1]), relation(*rows))


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_has_no_scale(relation: Relation, rows: Pair) -> None:
    value = relation(100 * rows[0], rows[1])
    torch.testing.assert_close(value, relation(*rows), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_with_itself_is_zero_and_has_no_slope(relation: Relation, rows: Pair) -> None:
    student = rows[1].clone().requires_grad_()
    value = relation(student, rows[1])
    value.backward()
    torch.testing.assert_close(value, scalar(0.0))
    torch.testing.assert_close(student.grad, torch.zeros_like(rows[1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("relation", [distance_relation, angle_relation])
def test_equal_samples_leave_a_finite_slope(relation: Relation, rows: Pair) -> None:
    student = rows[0][[0, 0, 1, 1]].clone().requires_grad_()
    relation(student, rows[1]).backward()
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 10


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_refuses_one_sample_that_torch_would_repeat(
    relation: Relation, rows: Pair
) -> None:
    with pytest.raises(ValueError, match="the same samples"):
        relation(rows[0], rows[1][:1])
