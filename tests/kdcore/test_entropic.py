"""Entropic transport, of all mass or of some: another library, finite differences, hard samples."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from kdcore.metrics.distances import distances
from kdcore.metrics.entropic import (
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


def test_unbalanced_transport_leaves_an_outlier_alone() -> None:
    student, teacher = rows(6, 2), rows(6, 2, seed=1)
    student[0] += 100
    student.requires_grad_()
    unbalanced_wasserstein(student, teacher, reg=0.1, margin=1.0).backward()
    assert float(student.grad[0].abs().max()) < 1e-6
    assert float(student.grad[1:].abs().max()) > 1e-3
