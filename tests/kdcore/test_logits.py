"""Cross-entropy and Hinton's divergence against loops in plain Python."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor

from kdcore.losses.logits import (
    cross_entropy,
    jensen_shannon,
    kd,
    reverse_kd,
    soft_cross_entropy,
    sparse_kd,
)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64) * 3
    return student, teacher


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_equals_its_loop(logits: tuple[Tensor, Tensor], smoothing: float) -> None:
    label, expected = [2, 0, 2], 0.0
    for row, right in zip(logits[0].tolist(), label, strict=True):
        for k, probability in enumerate(softmax(row)):
            wanted = (1 - smoothing) * (k == right) + smoothing / len(row)
            expected -= wanted * log(probability) / len(label)
    value = cross_entropy(logits[0], torch.tensor(label), label_smoothing=smoothing)
    torch.testing.assert_close(value, scalar(expected))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_equals_its_loop(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    student, teacher, expected = logits[0].tolist(), logits[1].tolist(), 0.0
    for here, there in zip(student, teacher, strict=True):
        p, q = softmax(here, temperature), softmax(there, temperature)
        for k in range(len(p)):
            expected += temperature**2 * q[k] * log(q[k] / p[k]) / len(student)
    torch.testing.assert_close(kd(*logits, temperature=temperature), scalar(expected))


def test_kd_is_by_default_at_temperature_four(logits: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(kd(*logits), kd(*logits, temperature=4.0), rtol=0, atol=0)


def test_kd_is_zero_with_zero_gradient_where_student_equals_teacher(
    logits: tuple[Tensor, Tensor],
) -> None:
    student = logits[1].clone().requires_grad_()
    value = kd(student, logits[1], temperature=3.0)
    value.backward()
    torch.testing.assert_close(value, scalar(0.0))
    torch.testing.assert_close(student.grad, torch.zeros_like(logits[1]))


def test_kd_ignores_a_constant_added_to_a_row(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    shift = torch.tensor([[5.0], [-100.0], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(kd(student + shift, teacher), kd(student, teacher))


def test_the_gradient_of_kd_at_large_temperature_is_that_of_centred_logits(
    logits: tuple[Tensor, Tensor],
) -> None:
    # Hinton, Vinyals & Dean 2015, equation 4, times T^2: (s - t) / (B K) for centred logits
    student, teacher = (rows - rows.mean(dim=1, keepdim=True) for rows in logits)
    for temperature in (1e3, 1e4):
        asking = student.clone().requires_grad_()
        kd(asking, teacher, temperature=temperature).backward()
        torch.testing.assert_close(asking.grad, (student - teacher) / 12, rtol=0.02, atol=0.002)


def test_kd_is_finite_for_confident_logits_in_float32() -> None:
    student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    torch.testing.assert_close(kd(student, teacher, temperature=1.0), torch.tensor(1e4))


def test_reverse_kd_is_kd_of_the_exchanged_networks(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    value = reverse_kd(student, teacher, temperature=2.0)
    torch.testing.assert_close(value, kd(teacher, student, temperature=2.0))


def test_soft_cross_entropy_is_kd_plus_the_entropy_of_the_teacher(
    logits: tuple[Tensor, Tensor],
) -> None:
    entropy = 0.0
    for row in logits[1].tolist():
        entropy -= sum(q * log(q) for q in softmax(row, 2.0)) / len(logits[1])
    value = soft_cross_entropy(*logits, temperature=2.0)
    torch.testing.assert_close(value, kd(*logits, temperature=2.0) + 4 * entropy)


def test_jensen_shannon_equals_its_loop(logits: tuple[Tensor, Tensor]) -> None:
    expected = 0.0
    for here, there in zip(*(rows.tolist() for rows in logits), strict=True):
        for q, p in zip(softmax(here, 3.0), softmax(there, 3.0), strict=True):
            m = (p + q) / 2
            expected += (p * log(p / m) + q * log(q / m)) / 2 / len(logits[0])
    torch.testing.assert_close(jensen_shannon(*logits, temperature=3.0), scalar(expected))


def test_jensen_shannon_is_log_2_between_opposites_and_zero_between_equals() -> None:
    student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    torch.testing.assert_close(jensen_shannon(student, teacher), torch.tensor(log(2)))
    torch.testing.assert_close(jensen_shannon(student, student), torch.tensor(0.0))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("shape", [(6, 1), (1, 5), (5,), ()])
def test_kd_refuses_shapes_that_torch_would_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the same shape, got \(6, 5\) and \("):
        kd(torch.randn(6, 5), torch.randn(shape))


def test_a_batch_of_a_single_class_is_an_ordinary_batch() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    expected = (log(1 + exp(-1)) + log(2)) / 2
    value = cross_entropy(student, torch.tensor([0, 0]))
    torch.testing.assert_close(value, scalar(expected))


def test_with_one_class_alone_both_losses_are_zero() -> None:
    student, teacher = torch.randn(2, 3, 1, dtype=torch.float64)
    torch.testing.assert_close(kd(student, teacher), scalar(0.0))
    torch.testing.assert_close(cross_entropy(student, torch.zeros(3).long()), scalar(0.0))


# --- what is left of the logits when few are kept ---------------------------------------------

SPARSE_LABEL = torch.tensor([3, 0, 2])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_sparse_kd_equals_its_loop(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    rows = zip(*(one.tolist() for one in (*logits, SPARSE_LABEL)), strict=True)
    expected = 0.0
    for here, there, label in rows:
        p, q = softmax(there, temperature), softmax(here, temperature)
        best = max(range(4), key=there.__getitem__)
        kept, rest = {best, label}, set(range(4)) - {best, label}
        pairs = [(p[k], q[k]) for k in kept]
        pairs.append((sum(p[k] for k in rest), sum(q[k] for k in rest)))
        expected += temperature**2 * sum(a * log(a / b) for a, b in pairs) / 3
    value = sparse_kd(*logits, SPARSE_LABEL, kept=1, temperature=temperature)
    torch.testing.assert_close(value, scalar(expected))


@pytest.mark.parametrize("kept", [3, 4, 10])
def test_sparse_kd_of_all_classes_is_kd(logits: tuple[Tensor, Tensor], kept: int) -> None:
    # with three kept of four, the rest is a single class or, with the label, none
    value = sparse_kd(*logits, SPARSE_LABEL, kept=kept, temperature=3.0)
    torch.testing.assert_close(value, kd(*logits, temperature=3.0))


def test_sparse_kd_is_never_above_kd_and_grows_with_what_is_kept() -> None:
    student, teacher = torch.randn(2, 50, 20, dtype=torch.float64) * 3
    label = torch.arange(50) % 20
    values = [sparse_kd(student, teacher, label, kept=kept).item() for kept in range(1, 21)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(kd(student, teacher, temperature=1.0).item())


def test_sparse_kd_asks_for_the_rest_s_mass_too(logits: tuple[Tensor, Tensor]) -> None:
    _, teacher = logits
    at_teacher = sparse_kd(teacher, teacher, SPARSE_LABEL, kept=1)
    torch.testing.assert_close(at_teacher, scalar(0.0))
    # a student that gives the rest nothing is further away, though it is surer of what is kept
    sure = teacher.clone().scatter_add(1, teacher.argmax(1)[:, None], scalar(9.0).expand(3, 1))
    assert sparse_kd(sure, teacher, SPARSE_LABEL, kept=1) > 0.01
