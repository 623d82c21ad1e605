"""A loss on regions of a picture, against its loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.losses.decoupled import decoupled_kd
from kdcore.losses.logits import kd
from kdcore.losses.regions import regional_kd
from kdcore.types import Classifier

LABEL = torch.tensor([2, 0, 1])


def network(channels: int) -> tuple[Tensor, Classifier]:
    weight, bias = torch.randn(4, channels), torch.randn(4)
    return torch.randn(3, channels, 4, 4), Classifier(weight, bias)


@pytest.mark.parametrize("divergence", ["kd", "dkd"])
def test_regional_kd_equals_its_loop(divergence: str) -> None:
    (here, of_student), (there, of_teacher) = network(2), network(3)

    def says(feature: Tensor, classifier: Classifier) -> Tensor:
        return F.linear(feature.mean(dim=(1, 2)), *classifier)[None]

    cells = [(0, 4, 0, 4), (0, 2, 0, 2), (0, 2, 2, 4), (2, 4, 0, 2), (2, 4, 2, 4)]
    total, contrary = torch.zeros(()), 0
    for s, t, y in zip(here, there, LABEL, strict=True):
        is_right = says(t, of_teacher).argmax() == y
        for top, bottom, left, right in cells:
            of_s = says(s[:, top:bottom, left:right], of_student)
            of_t = says(t[:, top:bottom, left:right], of_teacher)
            twice = (of_t.argmax() == y) != is_right
            contrary += int(twice)
            loss = decoupled_kd(of_s, of_t, y[None]) if divergence == "dkd" else kd(of_s, of_t)
            total += (2 if twice else 1) * loss / len(cells) / len(LABEL)
    value = regional_kd(
        here, there, LABEL, of_student, of_teacher, grids=(1, 2), divergence=divergence
    )
    torch.testing.assert_close(value, total)
    assert contrary > 0


def test_regional_kd_of_the_whole_map_is_kd_of_the_logits() -> None:
    (here, of_student), (there, of_teacher) = network(2), network(3)
    logits = (
        F.linear(feature.mean(dim=(2, 3)), *classifier)
        for feature, classifier in ((here, of_student), (there, of_teacher))
    )
    value = regional_kd(here, there, LABEL, of_student, of_teacher, grids=(1,))
    torch.testing.assert_close(value, kd(*logits))


def test_regional_kd_refuses_a_map_that_its_classifier_does_not_read() -> None:
    (here, of_student), (there, of_teacher) = network(2), network(3)
    with pytest.raises(ValueError, match="student's classifier reads 3 channels"):
        regional_kd(here, there, LABEL, of_teacher, of_teacher)
    with pytest.raises(ValueError, match="needs the teacher's classifier"):
        regional_kd(here, there, LABEL, of_student, None)
