"""Attention maps and class activation maps against loops over tiny maps."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor

from kdcore.losses import LOSSES
from kdcore.losses.attention import attention_distance, attention_transfer, class_activation
from kdcore.losses.features import softmax_regression
from kdcore.types import Batch, Classifier, Outputs, Probe


@pytest.fixture
def maps() -> tuple[Tensor, Tensor]:
    normal = torch.randn(7, 2, 2, 3, dtype=torch.float64)
    return normal[:3].movedim(0, 1), normal[3:].movedim(0, 1)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def unit(row: list[float]) -> list[float]:
    length = sqrt(sum(value**2 for value in row))
    return [value / length for value in row]


def squared_distances(student: Tensor, teacher: Tensor, power: float) -> list[float]:
    """Of the unit attention maps, for each picture."""

    def attention(maps: Tensor) -> list[float]:
        channels = maps.flatten(1).tolist()
        positions = zip(*channels, strict=True)
        return unit([sum(abs(x) ** power for x in values) / len(channels) for values in positions])

    rows = (
        (attention(here), attention(there)) for here, there in zip(student, teacher, strict=True)
    )
    return [sum((s - t) ** 2 for s, t in zip(here, there, strict=True)) for here, there in rows]


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_equals_its_loop(maps: tuple[Tensor, Tensor], power: float) -> None:
    squared = squared_distances(*maps, power)
    mean_of_squares = attention_transfer(*maps, power=power)
    torch.testing.assert_close(mean_of_squares, scalar(sum(squared) / (2 * 6)))
    distance = attention_distance(*maps, power=power)
    torch.testing.assert_close(distance, scalar(sum(map(sqrt, squared)) / 2))


@pytest.mark.parametrize("loss", [attention_transfer, attention_distance])
def test_attention_ignores_the_size_of_maps_and_the_order_of_channels(
    loss: type, maps: tuple[Tensor, Tensor]
) -> None:
    student, teacher = maps
    size = torch.tensor([2.0, 0.1], dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(loss(student.flip(1) * size, -teacher), loss(student, teacher))


def test_the_paper_s_weight_is_half_its_beta_for_maps_of_8_by_8() -> None:
    assert LOSSES["at_paper"].weight == 1e3 / (8 * 8) / 2


def activations(maps: Tensor, classifier: Classifier, k: int) -> list[float]:
    """Of class k for one picture of 2 x 4 positions, averaged to 2 x 2."""
    found = []
    for row in range(2):
        for column in (0, 2):
            two = maps[:, row, column : column + 2].mean(dim=1).tolist()
            found.append(
                sum(x * w for x, w in zip(two, classifier.weight[k].tolist(), strict=True))
            )
    return found


@pytest.mark.parametrize("normalise", [True, False])
def test_class_activations_equal_their_loop(normalise: bool) -> None:
    maps = [torch.randn(2, channels, 2, 4).double() for channels in (3, 4)]
    classifiers = [Classifier(torch.randn(5, width).double(), torch.zeros(5)) for width in (3, 4)]
    expected = 0.0
    for b in range(2):
        for k in range(5):
            rows = [
                activations(held[b], classifier, k)
                for held, classifier in zip(maps, classifiers, strict=True)
            ]
            here, there = map(unit, rows) if normalise else rows
            squared = sum((s - t) ** 2 for s, t in zip(here, there, strict=True))
            expected += squared / (2 * 5 * 4)
    value = class_activation(*maps, *classifiers, resolution=2, normalise=normalise)
    torch.testing.assert_close(value, scalar(expected))


def test_class_activations_add_up_to_the_logits_without_their_bias() -> None:
    # over one position, with raw maps, CAT-KD is the mean squared error of those logits
    maps, classifier = torch.randn(6, 3, 4, 4), Classifier(torch.randn(5, 3), torch.randn(5))
    student, teacher = maps[:3], maps[3:]
    value = class_activation(
        student, teacher, classifier, classifier, resolution=1, normalise=False
    )
    difference = (student - teacher).mean(dim=(2, 3)) @ classifier.weight.T
    torch.testing.assert_close(value, difference.square().mean())


def test_a_layer_that_is_not_the_classifier_s_is_refused_by_class_activations() -> None:
    right, wrong = Classifier(torch.randn(5, 3), torch.zeros(5)), torch.randn(2, 4, 2, 2)
    with pytest.raises(ValueError, match=r"teacher's layer .* \(B, 3, H, W\); got \(2, 4, 2, 2\)"):
        class_activation(torch.randn(2, 3, 2, 2), wrong, right, right)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (1, 4, 2, 3), (2, 4), (2, 6, 3)])
def test_maps_that_torch_would_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    for loss in (attention_transfer, attention_distance):
        with pytest.raises(ValueError, match=r"maps .* of the same height and width, got \(2, 3"):
            loss(torch.randn(2, 3, 2, 3), torch.randn(shape))


@pytest.mark.parametrize("key", ["srrl", "cat_kd"])
def test_a_teacher_without_its_classifier_is_refused(key: str) -> None:
    features = {"embedding": torch.randn(2, 3), "map": torch.randn(2, 3, 2, 2)}
    student = Outputs(torch.randn(2, 5), features, Classifier(torch.randn(5, 3), torch.randn(5)))
    teacher = Outputs(torch.randn(2, 5), features)
    batch = Batch(torch.randn(2, 3, 4, 4), torch.arange(2), torch.arange(2), teacher)
    term = LOSSES[key].build({}, {"map": "map"}, Probe(student, batch))
    with pytest.raises(ValueError, match="needs the teacher's classifier, and its outputs carry"):
        term(student, teacher, batch)


def test_softmax_regression_is_zero_at_the_teacher_and_weighs_both_parts() -> None:
    teacher, student = torch.randn(2, 4, 3)
    classifier = Classifier(torch.randn(5, 3), torch.randn(5))
    logits = teacher @ classifier.weight.T + classifier.bias
    value = softmax_regression(teacher, teacher, logits, classifier)
    torch.testing.assert_close(value, torch.zeros(()), rtol=0, atol=1e-12)
    value = softmax_regression(
        student, teacher, logits, classifier, feature_weight=2.0, classifier_weight=3.0
    )
    error = student - teacher
    by_class = (error @ classifier.weight.T).square().mean()
    torch.testing.assert_close(value, 2 * error.square().mean() + 3 * by_class)
