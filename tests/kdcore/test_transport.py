"""The squared Wasserstein distance against two solvers, its laws and its edges."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from kdcore.losses.distributions import wasserstein
from kdcore.metrics.conditional import class_wasserstein
from kdcore.metrics.plans import transport_plan
from kdcore.metrics.transport import squared_wasserstein, wasserstein_1


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalar(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def squared_costs(student: Tensor, teacher: Tensor) -> np.ndarray:
    return cdist(student.numpy(), teacher.numpy(), "sqeuclidean")


@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (7, 4), (40, 3), (16, 64)])
def test_between_equal_numbers_it_is_the_best_assignment(n: int, d: int) -> None:
    student, teacher = rows(n, d), rows(n, d, seed=1)
    cost = squared_costs(student, teacher)
    expected = cost[linear_sum_assignment(cost)].mean()  # scipy's Hungarian solver
    torch.testing.assert_close(squared_wasserstein(student, teacher), scalar(expected))


@pytest.mark.parametrize(("n", "m"), [(5, 8), (8, 5), (1, 6), (30, 7)])
def test_between_different_numbers_it_is_the_value_of_the_linear_program(n: int, m: int) -> None:
    student, teacher = rows(n, 3), rows(m, 3, seed=1)
    expected = ot.emd2(ot.unif(n), ot.unif(m), squared_costs(student, teacher))
    torch.testing.assert_close(squared_wasserstein(student, teacher), scalar(expected))


@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 8), (1, 4)])
def test_the_plan_has_uniform_margins_and_few_entries(n: int, m: int) -> None:
    row, column, mass, _ = transport_plan(rows(n, m).square())
    uniform = [torch.full((size,), 1 / size, dtype=torch.float64) for size in (n, m)]
    torch.testing.assert_close(torch.zeros(n).double().index_add(0, row, mass), uniform[0])
    torch.testing.assert_close(torch.zeros(m).double().index_add(0, column, mass), uniform[1])
    assert len(mass) <= n + m - 1


def test_the_gradient_pulls_every_row_to_its_partner() -> None:
    student, teacher = rows(9, 4).requires_grad_(), rows(9, 4, seed=1).requires_grad_()
    squared_wasserstein(student, teacher).backward()
    _, partner = linear_sum_assignment(squared_costs(student.detach(), teacher.detach()))
    expected = 2 / 9 * (student - teacher[partner]).detach()
    torch.testing.assert_close(student.grad, expected)
    torch.testing.assert_close(teacher.grad[partner], -expected)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("m", [6, 5])
def test_the_gradients_of_both_samples_are_those_of_finite_differences(m: int) -> None:
    student, teacher = rows(6, 3).requires_grad_(), rows(m, 3, seed=1).requires_grad_()
    labels = torch.tensor([0, 1, 1, 2, 0, 3]), torch.tensor([1, 2, 0, 0, 1, 4])[:m]
    assert torch.autograd.gradcheck(squared_wasserstein, (student, teacher))
    assert torch.autograd.gradcheck(wasserstein_1, (student, teacher))
    assert torch.autograd.gradcheck(
        lambda s, t: class_wasserstein(s, t, *labels, reduction="sum"), (student, teacher)
    )


def test_the_same_rows_in_another_order_are_at_distance_zero() -> None:
    student, order = rows(10, 4), torch.randperm(10)
    torch.testing.assert_close(
        squared_wasserstein(student, student[order]), scalar(0.0), rtol=0, atol=0
    )


def test_a_translation_costs_its_squared_length() -> None:
    student, shift = rows(8, 3), torch.tensor([30.0, -40.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(squared_wasserstein(student, student + shift), scalar(2500.0))


# drawn value by value rather than by seed, so that ties and equal rows are met
pairs = st.tuples(st.integers(1, 7), st.integers(1, 3)).flatmap(
    lambda size: st.lists(
        st.floats(-10, 10), min_size=2 * size[0] * size[1], max_size=2 * size[0] * size[1]
    ).map(lambda values: torch.tensor(values, dtype=torch.float64).reshape(2, *size))
)


@given(pairs)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_it_lies_between_the_distance_of_means_and_that_of_pairs(pair: Tensor) -> None:
    # specs/kd2m.md, "the ladder": Jensen on the left, the identity as a plan on the right
    student, teacher = pair
    means = (student.mean(dim=0) - teacher.mean(dim=0)).square().sum()
    paired = (student - teacher).square().sum(dim=1).mean()
    value = squared_wasserstein(student, teacher)
    assert means - 1e-9 <= value <= paired + 1e-9


def test_float32_gives_exactly_zero_for_equal_rows_far_from_the_origin() -> None:
    features = (rows(128, 200) + 10).float()  # squared norm 2e4, where a GEMM cost errs by 2e-3
    torch.testing.assert_close(
        squared_wasserstein(features, features.clone()), torch.tensor(0.0), rtol=0, atol=0
    )


def test_float32_finds_the_plan_of_rows_that_vary_little_around_a_large_mean() -> None:
    student = (0.01 * rows(128, 200) + 10).float()
    teacher = (0.01 * rows(128, 200, seed=1) + 10).float()
    expected = squared_wasserstein(student.double(), teacher.double()).float()
    torch.testing.assert_close(squared_wasserstein(student, teacher), expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("of_student", [True, False])
@pytest.mark.parametrize("m", [4, 5])
def test_features_that_are_not_finite_are_refused(bad: float, of_student: bool, m: int) -> None:
    student, teacher, label = rows(4, 3), rows(m, 3, seed=1), torch.tensor([0, 1, 1, 2, 2])
    (student if of_student else teacher)[2, 1] = bad
    by_class = (student, teacher, label[:4], label[:m])
    distances = {
        "w2": lambda: squared_wasserstein(student, teacher),
        "w1": lambda: wasserstein_1(student, teacher),
        "cw2": lambda: class_wasserstein(*by_class),
        "cw1": lambda: class_wasserstein(*by_class, power=1),
    }
    for distance in distances.values():
        with pytest.raises(ValueError, match="not finite"):
            distance()


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("shape", [(4, 2), (4, 1), (3,), (4, 3, 1)])
def test_different_widths_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the same width, got \(4, 3\) and \("):
        squared_wasserstein(rows(4, 3), rows(*shape))


def test_unnormalised_the_loss_is_the_distance() -> None:
    student, teacher = rows(5, 3), rows(5, 3, seed=1)
    value = wasserstein(student, teacher, normalise="none")
    torch.testing.assert_close(value, squared_wasserstein(student, teacher), rtol=0, atol=0)


def test_the_loss_divides_by_the_total_variance_of_the_teacher() -> None:
    student, teacher = rows(5, 3), rows(5, 3, seed=1)
    variance = float(np.var(teacher.numpy(), axis=0).sum())
    expected = squared_wasserstein(student, teacher) / variance
    torch.testing.assert_close(wasserstein(student, teacher), expected)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_normalised_the_loss_ignores_the_scale_of_both(scale: float) -> None:
    student, teacher = rows(6, 3), rows(6, 3, seed=1)
    value = wasserstein(scale * student, scale * teacher)
    torch.testing.assert_close(value, wasserstein(student, teacher))


@pytest.mark.parametrize("count", [1, 6])
def test_rows_of_the_teacher_that_do_not_vary_leave_the_distance_as_it_is(count: int) -> None:
    student, teacher = rows(count, 3).requires_grad_(), torch.full((count, 3), 0.1).double()
    teacher.requires_grad_()
    value = wasserstein(student, teacher)
    value.backward()
    torch.testing.assert_close(value, (student - teacher).square().sum(dim=1).mean())
    assert bool(student.grad.isfinite().all())
    assert bool(teacher.grad.isfinite().all())


def test_maps_and_tokens_are_averaged_over_positions() -> None:
    student, teacher = rows(5, 3, 2, 4), rows(5, 3, 2, 4, seed=1)
    expected = wasserstein(student.mean(dim=(2, 3)), teacher.mean(dim=(2, 3)))
    torch.testing.assert_close(wasserstein(student, teacher), expected)
    tokens = [maps.flatten(2).transpose(1, 2) for maps in (student, teacher)]
    torch.testing.assert_close(wasserstein(*tokens), expected)
