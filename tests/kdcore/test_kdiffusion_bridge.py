"""The bridge to the teacher's channels, and the variance of what crosses it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.kdiffusion.bridge import Bridge, Moments, moments
from kdcore.kdiffusion.guidance import target_guidance
from kdcore.kdiffusion.likelihood import Spread
from kdcore.kdiffusion.variance import PredictedVariance
from kdcore.types import Classifier

KINDS = {
    "vectors": ((6, 3, 4), (6, 5)),
    "tokens": ((6, 3, 7, 4), (6, 7, 5)),
    "maps": ((6, 3, 4, 4, 2), (6, 5, 2, 2)),
    "plain maps": ((6, 4, 2, 2), (6, 5, 4, 4)),
}


def random_pair(kind: str) -> tuple[Tensor, Tensor]:
    student, teacher = KINDS[kind]
    return 3 * torch.randn(student).double() + 1, 2 * torch.randn(teacher).double() - 1


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_and_feature_are_standardised_over_branches_rows_and_positions(kind: str) -> None:
    student, teacher = random_pair(kind)
    bridged = Bridge(student.shape, teacher.shape).double()(student, teacher)
    branches = 1 if kind == "plain maps" else 3
    assert bridged.estimates.shape[:3] == (branches, 6, 5)
    assert bridged.estimates.shape[1:] == bridged.clean.shape
    for held in (bridged.estimates, bridged.clean[None]):
        torch.testing.assert_close(held.mean((0, 1, 3)), torch.zeros(5).double())
        variance = held.var((0, 1, 3), correction=0)
        torch.testing.assert_close(variance, torch.ones(5).double(), rtol=1e-4, atol=0)
    measured = bridged.estimates.var((0, 1, 3), correction=0)
    torch.testing.assert_close(bridged.variance, measured)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bridge_is_one_linear_map_of_every_position_and_branch(kind: str) -> None:
    student, teacher = random_pair(kind)
    bridge = Bridge(student.shape, teacher.shape).double()
    bridge.gain.data.uniform_(0.5, 2)
    if kind == "plain maps":
        student = student[:, None]
    if student.ndim == 5:  # (B, branches, C, H, W); the larger map is averaged to the smaller
        size = min(student.shape[3], teacher.shape[2]), min(student.shape[4], teacher.shape[3])
        student = F.adaptive_avg_pool3d(student, (student.shape[2], *size))
        rows = student.flatten(3)
    else:
        rows = student.transpose(2, 3) if student.ndim == 4 else student[..., None]
    mapped = torch.einsum("bmcp,dc->mbdp", rows, bridge.projector.weight[:, :, 0])
    centred = mapped - mapped.mean((0, 1, 3), keepdim=True)
    scale = (mapped.var((0, 1, 3), correction=0) + 1e-5).sqrt()
    expected = centred / scale[:, None] * bridge.gain[:, None]
    value = bridge(random_pair_of(student, kind), teacher).estimates
    torch.testing.assert_close(value, expected)


def random_pair_of(student: Tensor, kind: str) -> Tensor:
    return student[:, 0] if kind == "plain maps" else student


def test_what_is_standardised_can_be_restored() -> None:
    x = torch.randn(4, 3, 5).double() * 7 + 2
    measured = moments(x)
    torch.testing.assert_close(measured.restore(measured.standardise(x)), x)


def test_a_channel_that_does_not_vary_stays_finite() -> None:
    student, teacher = torch.ones(2, 3, 4, requires_grad=True), torch.zeros(2, 5)
    bridged = Bridge(student.shape, teacher.shape)(student, teacher)
    (bridged.estimates.sum() + bridged.variance.sum()).backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((6, 3, 4), (6, 5, 2, 2)), ((6, 4), (6, 5, 2, 2)), ((6, 2, 3, 4, 5), (6, 5)), ((6,), (6,))],
)
def test_features_of_different_kinds_are_refused_with_both_shapes(
    student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="of the same kind; got") as refusal:
        Bridge(student, teacher)
    assert f"{student} from the student and {teacher} from the teacher" in str(refusal.value)


def test_sequences_of_different_lengths_are_refused() -> None:
    student, teacher = torch.randn(2, 7, 4), torch.randn(2, 9, 5)
    with pytest.raises(ValueError, match="equally many tokens, got 7 and 9"):
        Bridge(student.shape, teacher.shape)(student, teacher)


def test_the_predicted_variance_is_that_of_its_kind() -> None:
    prior, gain = torch.tensor([0.8, 0.0]).double(), torch.tensor([0.1, 1.0]).double()
    spread, student = Spread(prior, prior, gain), torch.tensor([2.0, 0.5, 1.0]).double()

    def predicted(kind: str) -> Tensor:
        return PredictedVariance(kind, 2, 3, initial=0.7, floor=0.01).double()(spread, student)

    learned = 0.7 + 1e-5
    expected = torch.stack([0.8 * student + 0.1 * learned, torch.full((3,), learned).double()])
    torch.testing.assert_close(predicted("learned"), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(predicted("fixed"), torch.stack([0.8 * student, 0.01 * student]))
    torch.testing.assert_close(predicted("l2"), torch.ones(2, 3).double())


def test_only_a_learned_variance_has_something_to_learn() -> None:
    for kind, number in (("learned", 6), ("fixed", 0), ("l2", 0)):
        made = PredictedVariance(kind, 2, 3, initial=1.0, floor=0.01)
        assert sum(parameter.numel() for parameter in made.parameters()) == number


@pytest.mark.parametrize("kind", ["vectors", "maps"])
def test_guidance_is_the_difference_of_what_the_classifier_says(kind: str) -> None:
    student, teacher = random_pair(kind)
    bridged = Bridge(student.shape, teacher.shape).double()(student, teacher)
    classifier = Classifier(torch.randn(3, 5).double(), torch.randn(3).double())
    squares = []
    for row in range(6):
        mean = sum(bridged.estimates[i, row] for i in range(3)) / 3
        deviation = (bridged.teacher.variance + 1e-5).sqrt()[:, None]
        estimate = mean * deviation + bridged.teacher.mean[:, None]
        feature = teacher[row].flatten(1) if kind == "maps" else teacher[row, :, None]
        if kind == "maps":
            estimate, feature = estimate.clamp(min=0), feature.clamp(min=0)
        said = [classifier.weight @ held.mean(1) + classifier.bias for held in (estimate, feature)]
        squares.append((said[0] - said[1]).square().mean())
    torch.testing.assert_close(target_guidance(bridged, classifier), torch.stack(squares).mean())


def test_guidance_without_a_classifier_is_refused() -> None:
    student, teacher = random_pair("maps")
    bridged = Bridge(student.shape, teacher.shape).double()(student, teacher)
    with pytest.raises(ValueError, match="needs the teacher's classifier"):
        target_guidance(bridged, None)


def test_moments_are_those_of_every_channel() -> None:
    x = torch.randn(4, 3, 5).double()
    expected = Moments(x.mean((0, 2)), x.var((0, 2), correction=0))
    torch.testing.assert_close(moments(x), expected)
