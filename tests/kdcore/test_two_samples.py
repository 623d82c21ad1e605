"""Distances between samples against scikit-learn, torchmetrics' formula, and their own laws."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import scipy.linalg
import torch
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from kdcore.dgm.evaluation import generation_distances, values_as_features
from kdcore.dgm.models.helmholtz import helmholtz_generator
from kdcore.dgm.models.ladder import Ladder, LadderGenerator
from kdcore.metrics.two_samples import nearest_neighbour_accuracy, sample_distances


@pytest.fixture
def samples() -> tuple[Tensor, Tensor]:
    return torch.randn(60, 5).double(), 0.8 * torch.randn(60, 5).double() + 0.4


def test_the_four_distances_are_those_of_other_libraries(samples: tuple[Tensor, Tensor]) -> None:
    x, y = (held.numpy() for held in samples)
    found = sample_distances(*samples)
    cov = [np.cov(held.T, bias=True) for held in (x, y)]
    trace = np.trace(cov[0] + cov[1] - 2 * scipy.linalg.sqrtm(cov[0] @ cov[1]).real)
    frechet = np.square(x.mean(0) - y.mean(0)).sum() + trace
    assert found["frechet"] == pytest.approx(frechet, rel=1e-9)
    assert found["emd"] == pytest.approx(ot.emd2([], [], euclidean_distances(x, y)), rel=1e-9)
    xx, yy, xy = (euclidean_distances(*p, squared=True) for p in ((x, x), (y, y), (x, y)))
    gram = [np.exp(-d / (2 * yy.mean())).mean() for d in (xx, yy, xy)]
    assert found["mmd"] == pytest.approx(np.sqrt(gram[0] + gram[1] - 2 * gram[2]), rel=1e-9)
    rows, label = np.concatenate([x, y]), np.repeat([0, 1], 60)
    nearest = NearestNeighbors(n_neighbors=2).fit(rows).kneighbors(rows)[1][:, 1]
    assert found["one_nn"] == pytest.approx((label[nearest] == label).mean())


def test_equal_samples_are_at_distance_zero_and_are_pairs(samples: tuple[Tensor, Tensor]) -> None:
    found = sample_distances(samples[0], samples[0].clone())
    assert found["one_nn"] == 0
    for name in ("frechet", "emd", "mmd"):
        assert found[name] == pytest.approx(0, abs=1e-6)


def test_samples_far_apart_are_always_told_apart(samples: tuple[Tensor, Tensor]) -> None:
    assert float(nearest_neighbour_accuracy(samples[0], samples[1] + 100)) == 1


def test_two_samples_of_one_distribution_are_told_apart_half_of_the_time() -> None:
    value = nearest_neighbour_accuracy(torch.randn(1500, 3), torch.randn(1500, 3))
    torch.testing.assert_close(value, torch.tensor(0.5), rtol=0, atol=0.04)


@pytest.mark.usefixtures("without_shape_checks")
def test_samples_of_other_sizes_or_widths_are_refused(samples: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="same size, got 60 and 50 rows"):
        nearest_neighbour_accuracy(samples[0], samples[1][:50])
    with pytest.raises(ValueError, match="same width"):
        sample_distances(samples[0], samples[1][:, :4])


def test_a_student_is_compared_with_its_teacher_its_data_and_the_floor() -> None:
    teacher, student = helmholtz_generator(8).eval(), helmholtz_generator(2).eval()
    with torch.no_grad():
        student.conditionals["y1"].net[2].bias += 2
    data = {"y1": torch.randn(200, 1), "y2": torch.randn(200, 1)}
    found = generation_distances(
        teacher, student, 200, data=data, paired=True, generator=torch.Generator().manual_seed(0)
    )
    comparisons = ("teacher", "floor", "data", "teacher_data", "paired")
    names = {f"{c}/{d}" for c in comparisons for d in ("frechet", "emd", "mmd", "one_nn")}
    assert found.keys() == names | {"rows"}
    assert found["floor/frechet"] < 0.1 < found["teacher/frechet"]
    assert found["rows"] == 200


def test_pairs_say_less_than_independent_samples() -> None:
    teacher = LadderGenerator(Ladder(4, 8, (4, 2, 1), image_channels=1)).eval()
    found = generation_distances(teacher, teacher, 100, targets="mean", paired=True)
    assert found["paired/one_nn"] == 0
    assert found["teacher/one_nn"] > 0.3


def test_other_features_take_the_place_of_values() -> None:
    teacher = helmholtz_generator(4).eval()

    def sums(targets: dict[str, Tensor]) -> Tensor:
        return values_as_features(targets).sum(dim=1, keepdim=True) * 1000

    generator = torch.Generator()
    plain = generation_distances(teacher, teacher, 50, generator=generator.manual_seed(0))
    summed = generation_distances(
        teacher, teacher, 50, features=sums, generator=generator.manual_seed(0)
    )
    assert summed["floor/emd"] > 100 * plain["floor/emd"]


def test_a_model_that_is_training_is_not_judged() -> None:
    with pytest.raises(ValueError, match="the student is in training mode"):
        generation_distances(helmholtz_generator(4).eval(), helmholtz_generator(4), 10)
