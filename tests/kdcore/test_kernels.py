"""Distances of kernels, plans and directions: other libraries, closed forms, edges, gradients."""

from __future__ import annotations

from collections.abc import Callable

import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kdcore.metrics.conditional import class_wasserstein
from kdcore.metrics.distances import distances
from kdcore.metrics.entropic import (
    entropic_wasserstein,
    sinkhorn_divergence,
    unbalanced_wasserstein,
)
from kdcore.metrics.kernels import (
    energy_distance,
    gaussian_mmd,
    polynomial_mmd,
    squared_mean_distance,
)
from kdcore.metrics.plans import LARGEST_OF_ALL_CLASSES, transport_plan
from kdcore.metrics.relaxed import (
    gromov_wasserstein,
    random_directions,
    sliced_wasserstein,
)
from kdcore.metrics.transport import diagonal_plan_mass


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


DIRECTIONS = random_directions(4, 16, seed=0, like=rows(1))
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": squared_mean_distance,
    "gaussian": lambda s, t: gaussian_mmd(s, t, bandwidth=1.0, scales=(0.5, 1.0)),
    "unbiased": lambda s, t: gaussian_mmd(s, t, bandwidth=1.0, unbiased=True),
    "polynomial": polynomial_mmd,
    "energy": energy_distance,
    "entropic": lambda s, t: entropic_wasserstein(s, t, reg=0.5),
    "debiased": lambda s, t: sinkhorn_divergence(s, t, reg=0.5),
    "sliced": lambda s, t: sliced_wasserstein(s, t, DIRECTIONS.to(s)),
    "unbalanced": lambda s, t: unbalanced_wasserstein(s, t, reg=0.5, margin=1.0),
    "gromov": gromov_wasserstein,
    "gromov-paired": lambda s, t: gromov_wasserstein(s, t, paired=len(s) == len(t)),
}
ZERO_AT_EQUALITY = DISTANCES.keys() - {"unbiased", "entropic", "unbalanced", "gromov-paired"}


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("m", [6, 5])
def test_the_gradient_is_that_of_finite_differences(name: str, m: int) -> None:
    student, teacher = rows(6, 4).requires_grad_(), rows(m, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(DISTANCES[name], (student, teacher))


@pytest.mark.parametrize("name", sorted(ZERO_AT_EQUALITY))
def test_another_order_is_at_distance_zero(name: str) -> None:
    student = rows(6, 4).requires_grad_()
    value = DISTANCES[name](student, student.detach()[torch.randperm(6)])
    value.backward()
    torch.testing.assert_close(value.detach(), scalar(0.0), rtol=0, atol=1e-12)
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("count", [1, 6])
def test_bfloat16_features_and_batches_of_one_are_finite(name: str, count: int) -> None:
    student = rows(count, 4).to(torch.bfloat16).float().requires_grad_()
    teacher = rows(count, 4, seed=1).to(torch.bfloat16).float()
    value = DISTANCES[name](student, teacher)
    value.backward()
    assert bool(value.isfinite())
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize(("n", "m"), [(8, 8), (9, 6)])
def test_the_sliced_distance_is_pots(n: int, m: int) -> None:
    pair = rows(n, 4), rows(m, 4, seed=1)
    arrays = [sample.numpy() for sample in (*pair, DIRECTIONS)]
    expected = ot.sliced_wasserstein_distance(*arrays[:2], projections=arrays[2]) ** 2
    torch.testing.assert_close(sliced_wasserstein(*pair, DIRECTIONS), scalar(expected))


def test_the_energy_distance_on_a_line_is_twice_the_squared_difference_of_ranks() -> None:
    student, teacher = scalar(0.0).reshape(1, 1), scalar(3.0).reshape(1, 1)
    torch.testing.assert_close(energy_distance(student, teacher), scalar(6.0))


def test_gromov_is_blind_to_rotations_and_compares_any_widths() -> None:
    student = rows(7, 3)
    rotation = torch.linalg.qr(rows(3, 3, seed=2)).Q
    wider = torch.cat([student @ rotation + 5, torch.zeros(7, 2)], dim=1)
    torch.testing.assert_close(gromov_wasserstein(student, wider), scalar(0.0), rtol=0, atol=1e-9)


def test_gromov_of_pairs_finds_a_noisy_rotation_and_is_at_most_what_keeping_them_costs() -> None:
    student = rows(64, 20)
    rotated = student @ torch.linalg.qr(rows(20, 20, seed=2)).Q + 0.1 * rows(64, 20, seed=3)
    kept = (distances(student, student) - distances(rotated, rotated)).square().mean()
    value = gromov_wasserstein(student, rotated, paired=True)
    assert value <= kept + 1e-12
    assert value < 0.1 * gromov_wasserstein(student, rotated)


def test_the_median_bandwidth_ignores_the_diagonals() -> None:
    student, teacher = scalar(0.0).reshape(1, 1), scalar(2.0).reshape(1, 1)
    value = gaussian_mmd(student, teacher, bandwidth="median")
    torch.testing.assert_close(value, 2 - 2 * scalar(-0.5).exp())


@pytest.mark.parametrize("n", [3, 64, 300])
def test_the_assignment_is_pots_plan(n: int) -> None:
    cost = distances(rows(n, 5), rows(n, 5, seed=1)).square()
    row, column, mass, _ = transport_plan(cost)
    expected = ot.emd2([], [], cost.numpy())
    torch.testing.assert_close((mass * cost[row, column]).sum(), scalar(expected))


@pytest.mark.parametrize("n", [40, LARGEST_OF_ALL_CLASSES, LARGEST_OF_ALL_CLASSES + 1])
@pytest.mark.parametrize("num_classes", [1, 4, 30])
def test_the_plans_of_all_classes_are_one_for_each_class(n: int, num_classes: int) -> None:
    student, teacher = rows(n, 3), rows(n, 3, seed=1)
    label = torch.randint(num_classes, (n,))
    order = torch.randperm(n)  # the same labels in another order
    expected = 0.0
    for c in label.unique():
        mine, theirs = student[label == c], teacher[order][label[order] == c]
        cost = distances(mine, theirs).square().numpy()
        expected += cost[linear_sum_assignment(cost)].sum() / n
    value = class_wasserstein(student, teacher[order], label, label[order])
    torch.testing.assert_close(value, scalar(expected))


def test_the_diagonal_mass_is_the_share_of_pairs_that_a_plan_keeps() -> None:
    teacher = 10 * rows(8, 3)
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    torch.testing.assert_close(diagonal_plan_mass(teacher[order], teacher), scalar(0.75))
