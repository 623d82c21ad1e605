"""Connectors: pairs of maps in order of depth, at one resolution."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from kdcore.losses.hints import bottleneck
from kdcore.losses.maps import Connectors, as_map, map_pairs
from kdcore.projectors import regressor
from kdcore.types import Batch, Outputs, Probe


def seen(shapes: Mapping[str, tuple[int, ...]]) -> Outputs:
    return Outputs(
        torch.randn(2, 5), {layer: torch.randn(2, *held) for layer, held in shapes.items()}
    )


def probe_of(
    student: Mapping[str, tuple[int, ...]], teacher: Mapping[str, tuple[int, ...]]
) -> Probe:
    teaching = seen(teacher)
    return Probe(
        seen(student), Batch(torch.randn(2, 3, 8, 8), torch.arange(2), torch.arange(2), teaching)
    )


STAGES = {"layer1": (2, 8, 8), "layer2": (4, 4, 4), "layer3": (8, 2, 2), "embedding": (8,)}


def test_pairs_go_from_the_largest_map_to_the_embedding() -> None:
    probe = probe_of(STAGES, STAGES)
    pairs = map_pairs({name: name for name in sorted(STAGES)}, probe)
    assert [pair.student for pair in pairs] == ["layer1", "layer2", "layer3", "embedding"]
    assert [tuple(pair.student_shape) for pair in pairs][2:] == [(2, 8, 2, 2), (2, 8, 1, 1)]


def test_layers_of_one_resolution_go_by_the_numbers_in_their_names() -> None:
    blocks = dict.fromkeys(["blocks.10", "blocks.2", "blocks.2.norm1", "stem"], (3, 4, 4))
    blocks |= {"embedding": (3,), "last": (3, 1, 1)}  # as small as an embedding, yet before it
    pairs = map_pairs({name: name for name in sorted(blocks)}, probe_of(blocks, blocks))
    expected = ["blocks.2", "blocks.2.norm1", "blocks.10", "stem", "last", "embedding"]
    assert [pair.student for pair in pairs] == expected


@pytest.mark.parametrize(
    ("student", "teacher"), [((3, 4, 4), (3,)), ((9, 3), (3, 4, 4)), ((3, 2, 2, 2),) * 2]
)
def test_a_map_beside_what_is_no_map_is_refused_with_both_layers_and_shapes(
    student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    probe = probe_of({"here": student}, {"there": teacher})
    with pytest.raises(ValueError, match=r"layers 'here': 'there': both must be maps") as refusal:
        map_pairs({"here": "there"}, probe)
    assert f"got {(2, *student)} from the student and {(2, *teacher)} from" in str(refusal.value)


@pytest.mark.parametrize("layers", [{"layer4": "layer1"}, {"layer1": "layer4"}])
def test_a_layer_that_a_network_has_not_is_refused(layers: Mapping[str, str]) -> None:
    with pytest.raises(ValueError, match=r"unknown layer of the \w+ 'layer4'; did you mean"):
        map_pairs(layers, probe_of(STAGES, STAGES))


def test_tokens_are_a_map_of_one_column_and_an_embedding_one_of_one_position() -> None:
    tokens, embedding = torch.randn(2, 5, 3), torch.randn(2, 3)
    assert as_map(tokens).shape == (2, 3, 5, 1)
    torch.testing.assert_close(as_map(tokens)[:, 1, :, 0], tokens[:, :, 1])
    torch.testing.assert_close(as_map(embedding)[:, :, 0, 0], embedding)


def test_maps_are_averaged_to_one_resolution_before_they_are_connected() -> None:
    probe = probe_of({"a": (3, 4, 4), "b": (2, 2, 2)}, {"a": (5, 2, 2), "b": (2, 4, 4)})
    connectors = Connectors({"a": "a", "b": "b"}, probe)
    student, teacher = probe.student, probe.batch.teacher
    (first, first_target), (second, second_target) = connectors(student, teacher)
    weight = connectors.connectors[0].weight[:, :, 0, 0]
    expected = torch.einsum("bchw,dc->bdhw", averaged(student.features["a"]), weight)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(first_target, teacher.features["a"])
    assert isinstance(connectors.connectors[1], nn.Identity)
    torch.testing.assert_close(second, student.features["b"])
    torch.testing.assert_close(second_target, averaged(teacher.features["b"]))


def averaged(maps: Tensor) -> Tensor:
    return torch.stack([maps[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(dim=0)


def test_a_connector_of_several_layers_may_be_given() -> None:
    probe = probe_of({"a": (3, 4, 4)}, {"a": (6, 2, 2)})
    ((made, target),) = Connectors({"a": "a"}, probe, bottleneck)(
        probe.student, probe.batch.teacher
    )
    assert made.shape == target.shape == (2, 6, 2, 2)


def test_a_regressor_is_learned_where_the_channels_agree_too() -> None:
    probe = probe_of({"a": (3, 4, 4)}, {"a": (3, 4, 4)})
    (made,) = Connectors({"a": "a"}, probe, regressor).connectors
    assert [tuple(held.shape) for held in made.parameters()] == [(3, 3, 1, 1)]
    assert [tuple(held.shape) for held in regressor((2, 3), (2, 3)).parameters()] == [(3, 3)]
