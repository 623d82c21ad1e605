"""Projectors: from the student's channels to the teacher's, and maps to one resolution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcore.losses import LOSSES
from kdcore.projectors import projector, same_resolution
from kdcore.types import Batch, Outputs, Probe


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((6, 4), (6, 4)), ((6, 9, 4), (6, 5, 4)), ((6, 4, 8, 8), (6, 4, 2, 2))],
)
def test_equal_channels_need_no_projector(
    student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    assert isinstance(projector(student, teacher), nn.Identity)


@pytest.mark.parametrize("shape", [(6,), (6, 9)])
def test_embeddings_and_tokens_get_a_linear_map_without_bias(shape: tuple[int, ...]) -> None:
    made, rows = projector((*shape, 3), (*shape, 4)), torch.randn(*shape, 3)
    assert isinstance(made, nn.Linear)
    assert [name for name, _ in made.named_parameters()] == ["weight"]
    torch.testing.assert_close(made(rows), rows @ made.weight.T)


def test_maps_get_a_1x1_convolution_without_bias() -> None:
    made, maps = projector((6, 3, 5, 5), (6, 4, 2, 2)), torch.randn(6, 3, 5, 5)
    assert isinstance(made, nn.Conv2d)
    assert [name for name, _ in made.named_parameters()] == ["weight"]
    expected = torch.einsum("bchw,dc->bdhw", maps, made.weight[:, :, 0, 0])
    torch.testing.assert_close(made(maps), expected)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((6, 3, 5, 5), (6, 4)), ((6, 3), (6, 9, 4)), ((6,), (6,)), ((6, 1, 1, 1, 1),) * 2],
)
def test_features_of_different_kinds_are_refused_with_both_shapes(
    student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="features can be compared if both are") as refusal:
        projector(student, teacher)
    assert f"{student} from the student and {teacher} from the teacher" in str(refusal.value)


def test_a_loss_between_a_map_and_an_embedding_is_refused_with_both_layers() -> None:
    features = {"embedding": torch.randn(2, 3), "map": torch.randn(2, 3, 4, 4)}
    outputs = Outputs(torch.randn(2, 5), features)
    batch = Batch(torch.randn(2, 3, 4, 4), torch.arange(2), torch.arange(2), outputs)
    message = r"layers 'embedding': 'map': .*\(2, 3\) from .*\(2, 3, 4, 4\) from the teacher"
    with pytest.raises(ValueError, match=message):
        LOSSES["mse"].build({}, {"embedding": "map"}, Probe(outputs, batch))


@pytest.mark.parametrize("swapped", [False, True])
def test_the_larger_map_is_averaged_to_the_smaller(swapped: bool) -> None:
    large, small = torch.randn(2, 3, 4, 6), torch.randn(2, 5, 2, 3)
    expected = torch.stack([large[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(dim=0)
    pair = same_resolution(small, large)[::-1] if swapped else same_resolution(large, small)
    torch.testing.assert_close(pair, (expected, small))


def test_each_side_of_a_map_is_averaged_to_the_smaller_of_both() -> None:
    tall, wide = torch.randn(2, 3, 4, 2), torch.randn(2, 3, 2, 4)
    here, there = same_resolution(tall, wide)
    torch.testing.assert_close(here, (tall[:, :, ::2] + tall[:, :, 1::2]) / 2)
    torch.testing.assert_close(there, (wide[..., ::2] + wide[..., 1::2]) / 2)


@pytest.mark.parametrize("shape", [(2, 3), (2, 7, 3), (2, 3, 4, 4)])
def test_features_without_resolution_or_of_the_same_are_left_alone(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(2, *shape)
    pair = same_resolution(student, teacher)
    assert pair[0] is student
    assert pair[1] is teacher
