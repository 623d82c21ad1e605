"""ReviewKD: maps that review deeper ones, and the distance over four resolutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdcore.losses import LOSSES, Term
from kdcore.losses.review import hierarchical_distance
from kdcore.types import Batch, Outputs, Probe

STUDENT = {"layer1": (2, 8, 8), "layer2": (4, 4, 4), "embedding": (6,)}
TEACHER = {"layer1": (3, 8, 8), "layer2": (5, 2, 2), "embedding": (7,)}


def seen(shapes: dict[str, tuple[int, ...]]) -> Outputs:
    features = {name: torch.randn(3, *shape).double() for name, shape in shapes.items()}
    return Outputs(torch.randn(3, 5), features)


def built(student: Outputs, teacher: Outputs, **params: int) -> tuple[Term, Batch]:
    batch = Batch(torch.randn(3, 3, 8, 8), torch.arange(3), torch.arange(3), teacher)
    layers = {layer: layer for layer in sorted(student.features)}
    return LOSSES["reviewkd"].build(params, layers, Probe(student, batch)).double(), batch


def mean_square(maps: Tensor) -> float:
    values = maps.flatten().tolist()
    return sum(value**2 for value in values) / len(values)


@pytest.mark.parametrize(("side", "sizes"), [(8, [4, 2, 1]), (4, [2, 1]), (2, [1]), (1, [])])
def test_the_hierarchical_distance_equals_its_loop(side: int, sizes: list[int]) -> None:
    difference = torch.randn(2, 3, side, side, dtype=torch.float64)
    teacher = torch.randn(2, 3, side, side, dtype=torch.float64)
    total, weights, weight = mean_square(difference), 1.0, 1.0
    for size in sizes:
        weight /= 2
        cells = difference.unflatten(3, (size, -1)).unflatten(2, (size, -1)).mean(dim=(3, 5))
        total += weight * mean_square(cells)
        weights += weight
    value = hierarchical_distance(teacher + difference, teacher)
    torch.testing.assert_close(value, torch.tensor(total / weights, dtype=torch.float64))


def test_the_deepest_layer_alone_is_two_convolutions() -> None:
    student, teacher = seen({"map": (4, 3, 3)}), seen({"map": (5, 3, 3)})
    term, batch = built(student, teacher)
    assert not term.attend
    made = term.expand[0](term.reduce[0](student.features["map"]))
    expected = hierarchical_distance(made, teacher.features["map"])
    torch.testing.assert_close(term(student, teacher, batch), expected)


def test_each_level_is_fused_with_the_deeper_ones_at_its_own_resolution() -> None:
    student, teacher = seen(STUDENT), seen(TEACHER)
    term, batch = built(student, teacher)
    names = ["layer1", "layer2", "embedding"]
    assert [pair.student for pair in term.pairs] == names

    deep = term.reduce[2](student.features["embedding"][:, :, None, None])
    embedding = teacher.features["embedding"][:, :, None, None]
    expected = hierarchical_distance(term.expand[2](deep), embedding)

    here = term.reduce[1](student.features["layer2"])  # 4 x 4, the teacher's is 2 x 2
    wide = deep.expand(-1, -1, 4, 4)
    share = term.attend[1](torch.cat([here, wide], dim=1)).sigmoid()
    middle = (here * share[:, :1] + wide * share[:, 1:])[:, :, ::2, ::2]
    expected = expected + hierarchical_distance(term.expand[1](middle), teacher.features["layer2"])

    here = term.reduce[0](student.features["layer1"])
    wide = middle.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    share = term.attend[0](torch.cat([here, wide], dim=1)).sigmoid()
    shallow = here * share[:, :1] + wide * share[:, 1:]
    expected = expected + hierarchical_distance(term.expand[0](shallow), teacher.features["layer1"])
    torch.testing.assert_close(term(student, teacher, batch), expected)


def test_the_width_is_that_of_the_student_s_deepest_layer_up_to_a_limit() -> None:
    for params, width in (({}, 6), ({"max_width": 3}, 3)):
        term, _ = built(seen(STUDENT), seen(TEACHER), **params)
        assert [tuple(part[0].weight.shape) for part in term.reduce] == [
            (width, channels, 1, 1) for channels in (2, 4, 6)
        ]
        assert [tuple(part[0].weight.shape) for part in term.expand] == [
            (channels, width, 3, 3) for channels in (3, 5, 7)
        ]
