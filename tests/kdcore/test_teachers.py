"""What live teachers say, alone and on average, and that they learn nothing by saying it."""

from __future__ import annotations

import copy
import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from kdcore.models import MODELS
from kdcore.taps import Tapped
from kdcore.teachers import (
    Ensemble,
    average_outputs,
    freeze,
    heard,
    taught,
    taught_together,
)
from kdcore.types import Batch, Outputs

SPACES: tuple[Ensemble, ...] = get_args(Ensemble)


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


# --- several teachers -------------------------------------------------------------------------


def outputs_of(*rows: list[float]) -> Outputs:
    return Outputs(torch.tensor(rows, dtype=torch.float64), {"embedding": torch.ones(len(rows), 2)})


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


FIRST = [[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]]
SECOND = [[0.0, 1.0, 4.0], [1.0, 1.0, -2.0]]
THIRD = [[-3.0, 0.0, 0.0], [0.5, 0.25, 0.0]]


def test_teachers_are_averaged_in_probability_or_in_logit_space() -> None:
    said = [outputs_of(*rows) for rows in (FIRST, SECOND, THIRD)]
    logits, likely = (average_outputs(said, space).logits for space in ("logits", "probabilities"))
    for row in range(2):
        spoken = [rows[row] for rows in (FIRST, SECOND, THIRD)]
        for k in range(3):
            assert float(logits[row, k]) == pytest.approx(sum(one[k] for one in spoken) / 3)
            mean = sum(softmax(one)[k] for one in spoken) / 3
            assert float(likely[row].softmax(dim=0)[k]) == pytest.approx(mean)
            assert float(likely[row, k]) == pytest.approx(math.log(mean))


@pytest.mark.parametrize("space", SPACES)
def test_an_average_is_of_logits_only_and_one_teacher_is_no_average(space: Ensemble) -> None:
    one, other = outputs_of(*FIRST), outputs_of(*SECOND)
    average = average_outputs([one, other], space)
    assert (dict(average.features), average.classifier) == ({}, None)
    assert average_outputs([one], space) is one


@pytest.mark.parametrize("space", SPACES)
def test_equal_teachers_predict_together_what_each_predicts(space: Ensemble) -> None:
    one = outputs_of(*FIRST)
    together = average_outputs([one, one], space).logits
    torch.testing.assert_close(together.softmax(dim=1), one.logits.softmax(dim=1))
    if space == "logits":
        same(together, one.logits)


@pytest.mark.parametrize("space", SPACES)
def test_an_average_is_in_float32_at_least_and_stands_large_logits(space: Ensemble) -> None:
    one, other = outputs_of([3e4, 0.0]), outputs_of([0.0, 3e4])
    half = [said.to(torch.bfloat16) for said in (one, other)]
    assert average_outputs([half[0], other], space).logits.dtype is torch.float64
    low = average_outputs(half, space).logits
    assert low.dtype is torch.float32
    torch.testing.assert_close(low.softmax(dim=1), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize("space", SPACES)
def test_the_gradient_of_an_average_reaches_every_teacher(space: Ensemble) -> None:
    logits = [torch.tensor(rows, requires_grad=True) for rows in (FIRST, SECOND)]
    average = average_outputs([Outputs(said, {}) for said in logits], space)
    average.logits[:, 0].sum().backward()
    for said in logits:
        assert said.grad is not None
        assert bool((said.grad[:, 0] > 0).all())


def test_teachers_of_different_classes_and_no_teachers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the same shape, got \[\(1, 2\), \(1, 3\)\]"):
        average_outputs([outputs_of([1.0, 2.0]), outputs_of([1.0, 2.0, 3.0])], "logits")
    with pytest.raises(ValueError, match="at least one teacher, got none"):
        average_outputs([], "logits")


def test_live_teachers_are_heard_by_name_beside_what_the_batch_carries(
    net: nn.Module, image: Tensor
) -> None:
    big, small = freeze(Tapped(net, ["block1"])), freeze(Tapped(MODELS["convnet"](5, width=1)))
    given = [
        Batch(batch.image, batch.label, batch.index, teachers={"kept": small(batch.image)})
        for batch in batches(image)
    ]
    precision = {"big": torch.float32}
    told = taught_together(given, {"big": big}, precision=precision, space="logits")
    for batch, got in zip(given, told, strict=True):
        assert set(got.teachers) == {"kept", "big"}
        assert heard(got, "kept") is batch.teachers["kept"]
        same(dict(got.teachers["big"].features), dict(big(batch.image).features))
        said = [teacher(batch.image).logits for teacher in (big, small)]
        assert got.teacher is not None
        torch.testing.assert_close(got.teacher.logits, (said[0] + said[1]) / 2)
        assert heard(got, None) is got.teacher


def test_the_only_teacher_is_the_batch_s_own_and_none_is_none(
    net: nn.Module, image: Tensor
) -> None:
    live = {"big": freeze(Tapped(net))}
    precision = {"big": torch.float32}
    for got in taught_together(batches(image), live, precision=precision, space="probabilities"):
        assert got.teacher is got.teachers["big"]
    for got in taught_together(batches(image), {}, precision={}, space="probabilities"):
        assert (got.teacher, dict(got.teachers)) == (None, {})


def test_every_live_teacher_must_be_frozen(net: nn.Module, image: Tensor) -> None:
    live = {"big": freeze(Tapped(net)), "small": Tapped(MODELS["convnet"](5, width=1)).train()}
    precision = dict.fromkeys(live, torch.float32)
    with pytest.raises(ValueError, match=r"training mode; pass it through freeze\(\)"):
        next(taught_together(batches(image), live, precision=precision, space="logits"))


def test_a_batch_moves_with_all_of_its_teachers(image: Tensor) -> None:
    said = {"big": outputs_of(*FIRST), "small": outputs_of(*SECOND)}
    (first, _) = batches(image)
    moved = Batch(first.image, first.label, first.index, teachers=said).to(torch.device("meta"))
    for outputs in moved.teachers.values():
        assert outputs.logits.device.type == outputs.features["embedding"].device.type == "meta"


def test_a_teacher_that_the_batch_does_not_carry_is_named(image: Tensor) -> None:
    (batch, _) = batches(image)
    with pytest.raises(ValueError, match=r"carries nothing of teacher 'big'; it has: none"):
        heard(batch, "big")
