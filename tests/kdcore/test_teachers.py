"""freeze and taught: what a live teacher says, and that it learns nothing by saying it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kdcore.models import MODELS
from kdcore.taps import Tapped
from kdcore.teachers import freeze, taught
from kdcore.types import Batch


@pytest.fixture
def net() -> nn.Module:
    return MODELS["convnet"](5, width=2).eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def same(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def batches(image: Tensor) -> list[Batch]:
    label = torch.zeros(len(image), dtype=torch.int64)
    return [Batch(image + shift, label, torch.arange(len(image))) for shift in range(2)]


def test_freeze_gives_the_same_network_in_eval_mode_without_gradients(net: nn.Module) -> None:
    teacher = Tapped(net.train())
    assert freeze(teacher) is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_taught_fills_in_what_the_teacher_says(net: nn.Module, image: Tensor) -> None:
    teacher = Tapped(net, ["block1"]).eval()  # not frozen: no_grad must do
    state = copy.deepcopy(teacher.state_dict())
    for given, got in zip(batches(image), taught(batches(image), teacher), strict=True):
        assert got.teacher is not None
        same((got.image, got.label, got.index), (given.image, given.label, given.index))
        same(got.teacher.logits, net(given.image))
        same(dict(got.teacher.features), dict(teacher(given.image).features))
        assert not got.teacher.logits.requires_grad
        assert not any(feature.requires_grad for feature in got.teacher.features.values())
        assert torch.is_grad_enabled()
    same(teacher.state_dict(), state)  # BatchNorm's statistics included


def test_taught_refuses_a_teacher_in_training_mode(net: nn.Module, image: Tensor) -> None:
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"training mode; pass it through freeze\(\)"):
        next(taught(batches(image), Tapped(net).train()))
    same(net.state_dict(), state)


def test_taught_refuses_a_teacher_of_which_a_part_is_in_training_mode(
    net: nn.Module, image: Tensor
) -> None:
    teacher = freeze(Tapped(net))
    net.block2.train()
    with pytest.raises(ValueError, match="training mode"):
        next(taught(batches(image), teacher))
