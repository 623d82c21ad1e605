"""Entropic transport, of all mass or of some: another library, finite differences, hard samples."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from kdcore.metrics.distances import distances
from kdcore.metrics.entropic import (
    EntropicPlan,
    entropic_plan,
    entropic_wasserstein,
    sharp_wasserstein,
    sinkhorn_divergence,
    unbalanced_wasserstein,
)
from kdcore.metrics.kernels import squared_mean_distance
from kdcore.metrics.transport import squared_wasserstein


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Of measures: with the difference of their masses."""
    return float((p * np.log(p / q) - p + q).sum())


def pots_unbalanced(student: Tensor, teacher: Tensor, reg: float, margin: float) -> EntropicPlan:
    """POT's plan and the objective at it; the value that POT 0.9.7 itself reports is zero."""
    cost = distances(student, teacher).square().numpy()
    a, b = (np.full(size, 1 / size) for size in cost.shape)
    plan = ot.unbalanced.sinkhorn_unbalanced(
        a, b, cost, reg, margin, reg_type="kl", stopThr=1e-15, numItermax=100_000
    )
    left = kl(plan.sum(axis=1), a) + kl(plan.sum(axis=0), b)
    value = float((plan * cost).sum()) + reg * kl(plan, np.outer(a, b)) + margin * left
    return EntropicPlan(torch.from_numpy(plan), scalar(value))


@pytest.mark.parametrize(("n", "m"), [(7, 7), (7, 5)])
def test_the_entropic_plan_is_pots(n: int, m: int) -> None:
    cost = distances(rows(n, 3), rows(m, 3, seed=1)).square()
    expected = ot.sinkhorn([], [], cost.numpy(), 2.0, method="sinkhorn_log", stopThr=1e-10)
    plan, value = entropic_plan(cost, reg=2.0)
    torch.testing.assert_close(plan, torch.from_numpy(expected), rtol=1e-6, atol=1e-9)
    entropy = float((expected * np.log(expected * n * m)).sum())
    primal = float((cost.numpy() * expected).sum()) + 2.0 * entropy
    torch.testing.assert_close(value, scalar(primal), rtol=1e-6, atol=0.0)


def test_newton_finishes_what_sinkhorn_would_take_thousands_of_steps_for() -> None:
    student = torch.cat([rows(20, 3), rows(12, 3) + 30])
    teacher = torch.cat([rows(20, 3, seed=1), rows(12, 3, seed=1) + 30])
    plan, _ = entropic_plan(distances(student, teacher).square(), reg=0.05)
    uniform = torch.full((32,), 1 / 32, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(dim=1), uniform, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(plan.sum(dim=0), uniform, rtol=1e-9, atol=0.0)


def test_the_entropic_values_lie_about_the_exact_one() -> None:
    pair = rows(9, 3), rows(9, 3, seed=1)
    exact = squared_wasserstein(*pair)
    assert exact <= sharp_wasserstein(*pair, reg=0.3) <= entropic_wasserstein(*pair, reg=0.3)
    torch.testing.assert_close(sharp_wasserstein(*pair, reg=1e-3), exact, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        sinkhorn_divergence(*pair, reg=1e5), squared_mean_distance(*pair), rtol=1e-3, atol=0.0
    )


UNBALANCED = pytest.mark.parametrize(
    ("n", "m", "reg", "margin"), [(7, 7, 0.5, 1.0), (6, 9, 0.1, 0.5), (9, 6, 1.0, 20.0)]
)


@UNBALANCED
def test_unbalanced_transport_is_pots(n: int, m: int, reg: float, margin: float) -> None:
    student, teacher = rows(n, 3), rows(m, 3, seed=1)
    expected = pots_unbalanced(student, teacher, reg, margin)
    plan, _ = entropic_plan(distances(student, teacher).square(), reg=reg, margin=margin)
    torch.testing.assert_close(plan, expected.plan, rtol=1e-9, atol=1e-13)
    value = unbalanced_wasserstein(student, teacher, reg=reg, margin=margin)
    torch.testing.assert_close(value, expected.value, rtol=1e-12, atol=0.0)


@UNBALANCED
def test_its_gradient_with_the_plan_held_fixed_is_that_of_pots_values(
    n: int, m: int, reg: float, margin: float
) -> None:
    student, teacher = rows(n, 3).requires_grad_(), rows(m, 3, seed=1).requires_grad_()
    unbalanced_wasserstein(student, teacher, reg=reg, margin=margin).backward()
    for sample, direction in ((student, rows(n, 3, seed=2)), (teacher, rows(m, 3, seed=3))):
        values = []
        for step in (1e-4, -1e-4):
            moved = [
                (x + step * direction if x is sample else x).detach() for x in (student, teacher)
            ]
            values.append(pots_unbalanced(*moved, reg, margin).value)
        expected = (values[0] - values[1]) / 2e-4
        torch.testing.assert_close((sample.grad * direction).sum(), expected, rtol=1e-6, atol=1e-8)


def test_unbalanced_transport_leaves_an_outlier_alone() -> None:
    student, teacher = rows(6, 2), rows(6, 2, seed=1)
    student[0] += 100
    student.requires_grad_()
    unbalanced_wasserstein(student, teacher, reg=0.1, margin=1.0).backward()
    assert float(student.grad[0].abs().max()) < 1e-6
    assert float(student.grad[1:].abs().max()) > 1e-3


@pytest.mark.parametrize("margin", [1e-3, 1.0, 1e3])
def test_mass_that_is_dear_to_leave_needs_no_thousands_of_steps(margin: float) -> None:
    # scaling shrinks its error by (1 + reg / margin)^-2 a step: 10,000 leave 3e-5 of the last value
    student, teacher = rows(30, 3), rows(40, 3, seed=1)
    cost = distances(student, teacher).square()
    plan, value = entropic_plan(cost, reg=0.01, margin=margin)
    here, there = plan.sum(dim=1), plan.sum(dim=0)
    weights = [torch.full_like(mass, 1 / len(mass)) for mass in (here, there)]

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return torch.special.xlogy(p, p / q).sum() - p.sum() + q.sum()

    left = divergence(here, weights[0]) + divergence(there, weights[1])
    entropy = divergence(plan, weights[0][:, None] * weights[1])
    primal = (plan * cost).sum() + 0.01 * entropy + margin * left
    torch.testing.assert_close(value, primal, rtol=1e-9, atol=0.0)  # no gap: both are optimal


def test_no_mass_is_left_where_that_costs_without_end() -> None:
    pair = rows(7, 3), rows(9, 3, seed=1)
    dear = unbalanced_wasserstein(*pair, reg=0.1, margin=1e9)
    torch.testing.assert_close(dear, entropic_wasserstein(*pair, reg=0.1), rtol=1e-6, atol=0.0)
