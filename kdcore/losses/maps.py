"""Pairs of maps in order of depth, and the connectors between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from kdcore.projectors import projector, same_resolution
from kdcore.terms import feature_of, present
from kdcore.types import Outputs, Probe

# from the student's shape to the teacher's, (B, C, H, W) both
Connector = Callable[[Sequence[int], Sequence[int]], nn.Module]


class MapPair(NamedTuple):
    """A layer of each network, and the shapes of their maps."""

    student: str
    teacher: str
    student_shape: Sequence[int]
    teacher_shape: Sequence[int]


def as_map(feature: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "b c h w"]:
    """Maps as they are, an embedding as a map of one position, tokens as a map of one column."""
    if feature.ndim == 2:
        return feature[:, :, None, None]
    return feature.mT[..., None] if feature.ndim == 3 else feature


def map_pairs(layers: Mapping[str, str], probe: Probe) -> list[MapPair]:
    """The run's pairs of layers, from the shallowest to the deepest.

    Depth is told by the resolution of the student's map, embeddings last, then by the numbers in
    the names: a configuration's order is that of the alphabet, ``embedding, layer10, layer2``.

    Raises ValueError for a layer that a network has not, and for a map paired with no map.
    """
    pairs = []
    for here, there in layers.items():
        student = feature_of("student", probe.student, here)
        teacher = feature_of("teacher", present(probe.batch.teacher), there)
        if student.ndim != teacher.ndim or student.ndim not in (2, 3, 4):
            raise ValueError(
                f"layers {here!r}: {there!r}: both must be maps (B, C, H, W), tokens (B, N, D) or "
                f"embeddings (B, D); got {tuple(student.shape)} from the student and "
                f"{tuple(teacher.shape)} from the teacher"
            )
        pairs.append(MapPair(here, there, as_map(student).shape, as_map(teacher).shape))
    return sorted(pairs, key=lambda pair: _depth(pair, probe.student.features[pair.student].ndim))


class Connectors(nn.Module):
    """Each student's map through a connector of its own, beside the teacher's, shallow first.

    Both are averaged to the smaller height and width of the two before: a connector of more than
    one layer does not commute with that.
    """

    def __init__(
        self, layers: Mapping[str, str], probe: Probe, connector: Connector = projector
    ) -> None:
        super().__init__()
        self.pairs = map_pairs(layers, probe)
        self.connectors = nn.ModuleList(
            connector(pair.student_shape, pair.teacher_shape) for pair in self.pairs
        )

    def forward(
        self, student: Outputs, teacher: Outputs | None
    ) -> list[tuple[Float[Tensor, "b c_s h w"], Float[Tensor, "b c_t h w"]]]:
        taught = present(teacher)
        connected = []
        for pair, connect in zip(self.pairs, self.connectors, strict=True):
            here, there = same_resolution(
                as_map(student.features[pair.student]), as_map(taught.features[pair.teacher])
            )
            connected.append((connect(here), there))
        return connected


def _depth(pair: MapPair, ndim: int) -> tuple[int, bool, list[str | int]]:
    _, _, height, width = pair.student_shape
    words = re.split(r"(\d+)", pair.student)  # every second one a number
    numbered = [int(word) if place % 2 else word for place, word in enumerate(words)]
    return -height * width, ndim == 2, numbered
