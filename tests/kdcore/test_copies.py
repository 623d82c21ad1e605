"""Many copies of the teacher's map in an expansion of the student's, and the student that folds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcore.expansion import ExpandedStudent
from kdcore.losses import LOSSES
from kdcore.losses.copies import copies_distance
from kdcore.models import MODELS
from kdcore.taps import Tapped
from kdcore.types import Batch, Probe


def test_the_distance_of_copies_is_the_sum_over_segments() -> None:
    student, teacher = torch.randn(2, 6, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    first, second = student[:, :3], student[:, 3:]
    expected = (first - teacher).square().mean() + (second - teacher).square().mean()
    torch.testing.assert_close(copies_distance(student, teacher, copies=2), expected)


@pytest.fixture
def student() -> ExpandedStudent:
    """A convolutional network with a detour of twice a teacher's 8 channels, all numbers drawn."""
    made = ExpandedStudent(MODELS["convnet"](5, width=1), "block3", channels=4, width=16)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return made.eval()


def test_the_expansion_of_a_student_needs_no_other(student: ExpandedStudent) -> None:
    teacher, image = (
        Tapped(MODELS["convnet"](5, width=2), ["block3"]).eval(),
        torch.randn(3, 3, 8, 8),
    )
    seen = Tapped(student, ["expand", "student.net.block3"])(image)
    batch = Batch(image, torch.arange(3), torch.arange(3), teacher(image))
    layers = {"expand": "block3"}
    term = LOSSES["norm"].build({"copies": 2}, layers, Probe(seen, batch))
    assert not list(term.parameters())
    target = batch.teacher.features["block3"]
    expected = copies_distance(seen.features["expand"], target, copies=2)
    torch.testing.assert_close(term(seen, batch.teacher, batch), expected)
    alone = LOSSES["norm"].build({}, {"student.net.block3": "block3"}, Probe(seen, batch))
    shapes = [tuple(held.shape) for held in alone.parameters()]
    assert shapes == [(64, 4, 1, 1), (64,), (64,)]  # eight copies of eight channels


def test_the_detour_is_added_to_the_map_before_its_mean(student: ExpandedStudent) -> None:
    image = torch.randn(3, 3, 8, 8)
    seen = Tapped(student, ["expand", "contract", "student.net.block3"])(image)
    maps = seen.features["student.net.block3"] + seen.features["contract"]
    torch.testing.assert_close(seen.features["embedding"], maps.mean(dim=(2, 3)))
    assert seen.features["expand"].shape == (3, 16, 2, 2)
    torch.testing.assert_close(
        seen.logits, seen.features["embedding"] @ seen.classifier.weight.T + seen.classifier.bias
    )


@pytest.mark.parametrize("bias", [True, False])
def test_the_folded_student_is_the_plain_network_with_the_same_logits(
    student: ExpandedStudent, bias: bool
) -> None:
    if not bias:
        student.student.net.classifier.bias = None
    image = torch.randn(3, 3, 8, 8)
    folded = student.folded()
    torch.testing.assert_close(folded(image), student(image))
    plain = MODELS["convnet"](5, width=1).eval()
    plain.load_state_dict(folded.state_dict())
    torch.testing.assert_close(plain(image), student(image))


def test_every_parameter_of_an_expanded_student_receives_a_gradient(
    student: ExpandedStudent,
) -> None:
    student.train()(torch.randn(3, 3, 8, 8)).square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
