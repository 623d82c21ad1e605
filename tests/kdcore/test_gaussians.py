"""Gaussian distances: closed forms, the ladder, degenerate samples, gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor

from kdcore.metrics.classes import class_mean_distance
from kdcore.metrics.conditional import class_wasserstein, joint_wasserstein, label_costs
from kdcore.metrics.gaussians import (
    class_gaussian_kl,
    class_gaussian_wasserstein,
    gaussian_kl,
    gaussian_wasserstein,
)
from kdcore.metrics.kernels import squared_mean_distance
from kdcore.metrics.nuclear import nuclear_norm_of_product
from kdcore.metrics.transport import squared_wasserstein

COVARIANCES = pytest.mark.parametrize("covariance", ["diagonal", "full"])
DIRECTIONS = ["forward", "reverse", "jeffreys"]
LABEL = torch.tensor([0, 2, 1, 2, 2, 1, 0, 2])


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def moments(sample: Tensor) -> tuple[np.ndarray, np.ndarray]:
    array = sample.numpy()
    return array.mean(axis=0), np.cov(array.T, bias=True)


@pytest.mark.parametrize(("n", "m", "d"), [(30, 30, 3), (9, 20, 4), (20, 9, 4)])
def test_the_full_distance_is_that_of_matrix_roots(n: int, m: int, d: int) -> None:
    student, teacher = rows(n, d), rows(m, d, seed=1) + 1
    (mean_s, cov_s), (mean_t, cov_t) = moments(student), moments(teacher)
    root = sqrtm(cov_s)
    cross = sqrtm(root @ cov_t @ root)
    expected = ((mean_s - mean_t) ** 2).sum() + np.trace(cov_s + cov_t - 2 * cross).real
    value = gaussian_wasserstein(student, teacher, covariance="full")
    torch.testing.assert_close(value, scalar(expected))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("n", "m", "d"), [(30, 20, 3), (5, 8, 12)])
def test_the_full_divergence_is_that_of_torch(n: int, m: int, d: int, direction: str) -> None:
    student, teacher = rows(n, d), rows(m, d, seed=1) + 1

    def gaussian(sample: Tensor) -> torch.distributions.MultivariateNormal:
        covariance = torch.cov(sample.mT, correction=0) + 0.1 * torch.eye(d, dtype=sample.dtype)
        return torch.distributions.MultivariateNormal(sample.mean(dim=0), covariance)

    p, q = gaussian(student), gaussian(teacher)
    forward = torch.distributions.kl_divergence(p, q)
    reverse = torch.distributions.kl_divergence(q, p)
    expected = {"forward": forward, "reverse": reverse, "jeffreys": (forward + reverse) / 2}
    value = gaussian_kl(student, teacher, covariance="full", direction=direction, eps=0.1)
    torch.testing.assert_close(value, expected[direction])


@COVARIANCES
@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("d", [2, 20])
def test_by_class_it_is_the_mean_over_the_classes_one_by_one(
    covariance: str, shrinkage: float, d: int
) -> None:
    student, teacher = rows(8, d), rows(8, d, seed=1)

    def pooled(sample: Tensor) -> np.ndarray:
        parts = [sample[label == LABEL] for label in range(3)]
        return sum(len(part) / 8 * np.cov(part.numpy().T, bias=True) for part in parts)

    def shrunk(sample: Tensor, label: int) -> tuple[np.ndarray, np.ndarray]:
        mean, own = moments(sample[label == LABEL])
        matrix = (1 - shrinkage) * own + shrinkage * pooled(sample)
        return mean, np.diag(np.diag(matrix)) if covariance == "diagonal" else matrix

    transport, divergence = [], []
    for label in range(3):
        (mean_s, cov_s), (mean_t, cov_t) = shrunk(student, label), shrunk(teacher, label)
        values, vectors = np.linalg.eigh(cov_s)
        root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        cross = np.sqrt(np.linalg.eigvalsh(root @ cov_t @ root).clip(0)).sum()
        means = ((mean_s - mean_t) ** 2).sum()
        transport.append(means + np.trace(cov_s) + np.trace(cov_t) - 2 * cross)
        floor = 0.1 * np.eye(d)
        p, q = (
            torch.distributions.MultivariateNormal(torch.tensor(mean), torch.tensor(cov + floor))
            for mean, cov in ((mean_s, cov_s), (mean_t, cov_t))
        )
        divergence.append(float(torch.distributions.kl_divergence(p, q)))
    inputs = (student, teacher, LABEL, LABEL)
    options = {"covariance": covariance, "shrinkage": shrinkage, "reduction": "mean_present"}
    value = class_gaussian_wasserstein(*inputs, **options)
    torch.testing.assert_close(value, scalar(np.mean(transport)), rtol=1e-6, atol=1e-6)
    value = class_gaussian_kl(*inputs, eps=0.1, **options)
    torch.testing.assert_close(value, scalar(np.mean(divergence)))


@COVARIANCES
def test_a_translation_costs_its_squared_length(covariance: str) -> None:
    student, shift = rows(9, 4).requires_grad_(), rows(4, seed=2)
    value = gaussian_wasserstein(student, student.detach() + shift, covariance=covariance)
    torch.testing.assert_close(value, shift.square().sum())
    value.backward()
    torch.testing.assert_close(student.grad, (-2 * shift / 9).expand(9, 4))


@COVARIANCES
def test_another_order_is_at_distance_and_divergence_zero(covariance: str) -> None:
    student, order = rows(9, 4).requires_grad_(), torch.randperm(9)
    other = student.detach()[order]
    value = gaussian_wasserstein(student, other, covariance=covariance) + gaussian_kl(
        student, other, covariance=covariance, eps=0.1
    )
    value.backward()
    torch.testing.assert_close(value, scalar(0.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros(9, 4).double(), rtol=0, atol=1e-7)


def test_orthogonal_lines_are_singular_and_at_distance_two() -> None:
    line = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64).requires_grad_()
    value = gaussian_wasserstein(line, line.detach().flip(1), covariance="full")
    value.backward()
    torch.testing.assert_close(value, scalar(2.0))
    assert bool(line.grad.isfinite().all())


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    n, d = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    values = st.lists(st.floats(-10, 10), min_size=2 * n * d, max_size=2 * n * d)
    pair = torch.tensor(draw(values), dtype=torch.float64).reshape(2, n, d)
    label = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    return pair[0], pair[1], label


@given(labelled())
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_the_ladder_rises(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    # specs/kd2m.md: every next quantity allows fewer plans, or counts more of what they cost
    student, teacher, label = sample
    logits = torch.zeros(len(label), 4, dtype=torch.float64)
    cost = label_costs(logits, logits, label, label, kind="onehot")
    by_class = (student, teacher, label, label)
    rungs = [
        squared_mean_distance(student, teacher),
        gaussian_wasserstein(student, teacher),
        gaussian_wasserstein(student, teacher, covariance="full"),
        squared_wasserstein(student, teacher),
        *(joint_wasserstein(student, teacher, cost, beta=beta) for beta in (1.0, 10.0, 1e4)),
        class_wasserstein(*by_class),
        (student - teacher).square().sum(dim=1).mean(),
    ]
    of_classes = [
        gaussian_wasserstein(student, teacher, covariance="full"),
        class_gaussian_wasserstein(*by_class, covariance="full"),
        class_wasserstein(*by_class),
    ]
    means = [class_mean_distance(*by_class), class_gaussian_wasserstein(*by_class), of_classes[1]]
    for ladder in (rungs, of_classes, means):
        assert bool((torch.stack(ladder).diff() >= -1e-9).all()), ladder
    torch.testing.assert_close(rungs[-3], rungs[-2])  # at last no plan crosses classes


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    f"{kind}-{covariance}": formula
    for covariance in ("diagonal", "full")
    for kind, formula in {
        "w2": lambda s, t, c=covariance: gaussian_wasserstein(s, t, covariance=c),
        "kl": lambda s, t, c=covariance: gaussian_kl(
            s, t, covariance=c, direction="jeffreys", eps=0.1
        ),
        "cw2": lambda s, t, c=covariance: class_gaussian_wasserstein(
            s, t, LABEL, LABEL, covariance=c, shrinkage=0.2
        ),
        "ckl": lambda s, t, c=covariance: class_gaussian_kl(
            s, t, LABEL, LABEL, covariance=c, shrinkage=0.2, eps=0.1
        ),
    }.items()
}


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("d", [3, 11])
def test_the_gradient_is_that_of_finite_differences(name: str, d: int) -> None:
    student, teacher = rows(8, d).requires_grad_(), rows(8, d, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(FORMULAS[name], (student, teacher))


def test_the_nuclear_norm_has_a_gradient_in_batches_and_both_routes() -> None:
    for d in (2, 5, 9):
        left, right = rows(3, 5, d).requires_grad_(), rows(3, 6, d, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(nuclear_norm_of_product, (left, right))


@pytest.mark.parametrize("name", FORMULAS)
def test_dead_columns_leave_value_and_gradient_finite(name: str) -> None:
    student, teacher = rows(8, 5), rows(8, 5, seed=1)
    student[:, 1] = student[:, 2] = teacher[:, 2] = teacher[:, 3] = 0
    student.requires_grad_()
    value = FORMULAS[name](student, teacher)
    value.backward()
    assert bool(value.isfinite())
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("same", [False, True])
def test_bfloat16_features_in_float32_are_finite(name: str, same: bool) -> None:
    student, teacher = (sample.to(torch.bfloat16).float() for sample in (rows(8, 5), rows(8, 5)))
    student = (student if same else 100 * student.relu()).requires_grad_()
    value = FORMULAS[name](student, teacher)
    value.backward()
    assert bool(value.isfinite())
    assert bool(student.grad.isfinite().all())


@COVARIANCES
def test_classes_of_one_sample_have_their_distance_and_a_finite_divergence(covariance: str) -> None:
    student, teacher, label = rows(4, 3), rows(4, 3, seed=1), torch.arange(4)
    value = class_gaussian_wasserstein(student, teacher, label, label, covariance=covariance)
    torch.testing.assert_close(value, (student - teacher).square().sum(dim=1).mean())
    value = class_gaussian_kl(student, teacher, label, label, covariance=covariance, eps=0.1)
    torch.testing.assert_close(value, (student - teacher).square().sum(dim=1).mean() / 0.2)


@COVARIANCES
def test_without_a_common_class_the_value_is_a_zero_with_a_graph(covariance: str) -> None:
    student, teacher = rows(4, 3).requires_grad_(), rows(5, 3, seed=1)
    inputs = (student, teacher, torch.zeros(4).long(), torch.ones(5).long())
    for value in (
        class_gaussian_wasserstein(*inputs, covariance=covariance),
        class_gaussian_kl(*inputs, covariance=covariance, eps=0.1),
        class_wasserstein(*inputs),
        class_mean_distance(*inputs),
    ):
        student.grad = None
        value.backward()
        torch.testing.assert_close(value.detach(), scalar(0.0), rtol=0, atol=0)
        torch.testing.assert_close(student.grad, torch.zeros(4, 3).double(), rtol=0, atol=0)


def test_the_mean_over_all_classes_needs_their_number() -> None:
    student = rows(8, 3)
    with pytest.raises(ValueError, match="num_classes"):
        class_wasserstein(student, student, LABEL, LABEL, reduction="mean_classes")
