"""Losses at other temperatures: what they ignore, and the adversary of ctkd."""

from __future__ import annotations

from dataclasses import replace
from math import cos, pi

import pytest
import torch
from torch import Tensor

from kdcore.losses.logits import kd
from kdcore.losses.temperatures import (
    LearnedTemperature,
    standardised_kd,
    transformed_teacher,
    weighted_transformed_teacher,
)
from kdcore.types import Batch, Outputs, Probe

Pair = tuple[Tensor, Tensor]


@pytest.fixture
def logits() -> Pair:
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64) * 3
    return student, teacher


def test_standardised_kd_ignores_the_scale_and_the_mean_of_each_row(logits: Pair) -> None:
    student, teacher = logits
    moved = student * torch.tensor([[7.0], [0.5], [2.0]]) + torch.tensor([[1.0], [-9.0], [3.0]])
    value, expected = standardised_kd(moved, teacher), standardised_kd(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    assert float(expected) > 0.01


def test_standardised_kd_learns_nothing_between_two_classes() -> None:
    student, teacher = torch.randn(2, 3, 2, dtype=torch.float64)
    student.requires_grad_()
    standardised_kd(student, teacher).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(teacher), rtol=0, atol=1e-6)


def test_a_transformed_teacher_is_a_softened_one_for_a_student_that_is_not(logits: Pair) -> None:
    student, teacher = logits
    expected = kd(student, teacher / 5, temperature=1.0)
    torch.testing.assert_close(transformed_teacher(*logits, exponent=0.2), expected)


def test_the_weight_of_a_transformed_teacher_is_the_sum_of_its_powers(logits: Pair) -> None:
    student, teacher = logits
    expected = torch.stack(
        [
            t.softmax(0).pow(0.3).sum() * transformed_teacher(s[None], t[None], exponent=0.3)
            for s, t in zip(student, teacher, strict=True)
        ]
    ).mean()
    value = weighted_transformed_teacher(*logits, exponent=0.3)
    torch.testing.assert_close(value, expected)


def value_and_slope(logits: Pair, epoch: float) -> tuple[Tensor, Tensor]:
    student, teacher = (Outputs(rows, {}) for rows in logits)
    batch = Batch(torch.zeros(3, 1, 1, 1), torch.zeros(3).long(), torch.arange(3), teacher)
    term = LearnedTemperature(Probe(student, batch)).double()
    value = term(student, teacher, replace(batch, epoch=epoch))
    value.backward()
    assert term.theta.grad is not None
    return value, term.theta.grad


def at_theta(logits: Pair, theta: float) -> Tensor:
    temperature = 1 + 20 * torch.tensor(theta, dtype=torch.float64).sigmoid()
    return kd(*logits, temperature=float(temperature))


@pytest.mark.parametrize("epoch", [0.0, 2.5, 5.0, 10.0, 200.0])
def test_the_learned_temperature_climbs_where_kd_descends(logits: Pair, epoch: float) -> None:
    value, slope = value_and_slope(logits, epoch)
    torch.testing.assert_close(value, at_theta(logits, 1.0))
    of_kd = (at_theta(logits, 1 + 1e-5) - at_theta(logits, 1 - 1e-5)) / 2e-5
    strength = (1 - cos(pi * min(epoch, 10) / 10)) / 2
    torch.testing.assert_close(slope, -strength * of_kd, rtol=1e-6, atol=1e-9)
    assert float(of_kd.abs()) > 1e-3
