"""The options of the losses on samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdcore.losses import LOSSES

BY_CLASS = [key for key, loss in LOSSES.items() if "labels" in loss.hyperparameters]
SHAPES = {"pool": (8, 4), "samples": (8, 4, 2, 3)}


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(
    key: str, label: Tensor, teacher_logits: Tensor, positions: str, labels: str = "true"
) -> Tensor:
    shape = SHAPES[positions]
    given = {
        "student": rows(*shape),
        "teacher": rows(*shape, seed=1),
        "label": label,
        "student_logits": rows(8, 3, seed=2),
        "teacher_logits": teacher_logits,
    }
    loss = LOSSES[key]
    chosen = [given[name] for name in loss.inputs]
    return loss.function(*chosen, labels=labels, positions=positions)


@pytest.mark.parametrize("key", BY_CLASS)
@pytest.mark.parametrize("positions", SHAPES)
def test_classes_may_be_what_the_teacher_takes_the_pictures_for(key: str, positions: str) -> None:
    true, logits = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), rows(8, 3, seed=3)
    taken = value(key, true, logits, positions, labels="teacher")
    expected = value(key, logits.argmax(dim=1), logits, positions)
    torch.testing.assert_close(taken, expected, rtol=0, atol=0)
    assert taken != value(key, true, logits, positions)


def test_every_loss_between_samples_has_the_options_that_it_can_have() -> None:
    of_classes = {"cw2", "jw2", "cgaussian_w2", "cgaussian_kl"}
    assert of_classes <= set(BY_CLASS)
    for key, loss in LOSSES.items():
        if "positions" in loss.hyperparameters:
            assert loss.takes_layers, key
            assert "normalise" in loss.hyperparameters, key
            # one plan over all classes has no values of classes to reduce
            averages = key in of_classes - {"jw2"}
            assert ("reduction" in loss.hyperparameters) is averages, key
