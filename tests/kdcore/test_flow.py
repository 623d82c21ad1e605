"""Products of the channels of two layers, against loops."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from kdcore.losses import LOSSES, Term
from kdcore.losses.flow import flow_distance, flow_matrix
from kdcore.types import Batch, Outputs, Probe

SHAPES = {"layer1": (2, 4, 4), "layer2": (3, 2, 4), "layer3": (4, 2, 2)}


def seen(shapes: dict[str, tuple[int, ...]]) -> Outputs:
    features = {name: torch.randn(2, *shape).double() for name, shape in shapes.items()}
    return Outputs(torch.randn(2, 5), features)


def built(student: Outputs, teacher: Outputs, **params: str) -> tuple[Term, Batch]:
    batch = Batch(torch.randn(2, 3, 8, 8), torch.arange(2), torch.arange(2), teacher)
    layers = {layer: layer for layer in student.features}
    return LOSSES["fsp"].build(params, layers, Probe(student, batch)).double(), batch


@pytest.mark.parametrize("pool", ["average", "max"])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_flow_matrix_equals_its_loop(pool: str, swapped: bool) -> None:
    large, small = torch.randn(2, 2, 4, 6).double(), torch.randn(2, 3, 2, 3).double()
    expected = torch.zeros(2, 2, 3, dtype=torch.float64)
    for b in range(2):
        for i in range(2):
            for j in range(3):
                for h in range(2):
                    for w in range(3):
                        four = large[b, i, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
                        value = four.mean() if pool == "average" else four.max()
                        expected[b, i, j] += value * small[b, j, h, w] / 6
    made = flow_matrix(small, large, pool=pool) if swapped else flow_matrix(large, small, pool=pool)
    torch.testing.assert_close(made, expected.mT if swapped else expected)


def test_the_distance_of_flow_matrices_equals_its_loops() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    total = norms = 0.0
    for b in range(2):
        for j in range(4):
            column = [float(teacher[b, i, j] - student[b, i, j]) ** 2 for i in range(3)]
            total, norms = total + sum(column), norms + sqrt(sum(column))
    expected = {"mean": total / 24, "sum": total / 2, "column_norm": norms / 2}
    for reduction, value in expected.items():
        made = flow_distance(student, teacher, reduction=reduction)
        torch.testing.assert_close(made, torch.tensor(value, dtype=torch.float64))


def test_each_layer_goes_with_the_next_in_order_of_depth() -> None:
    student, teacher = seen(SHAPES), seen(SHAPES)
    shuffled = Outputs(student.logits, dict(sorted(student.features.items(), reverse=True)))
    expected = 0.0
    for first, second in (("layer1", "layer2"), ("layer2", "layer3")):
        here, there = (
            flow_matrix(of.features[first], of.features[second], pool="max")
            for of in (student, teacher)
        )
        expected = expected + flow_distance(here, there, reduction="sum")
    for of_student in (student, shuffled):
        term, batch = built(of_student, teacher, pool="max", reduction="sum")
        torch.testing.assert_close(term(of_student, teacher, batch), expected)


def test_equal_channels_learn_nothing_and_others_a_projector() -> None:
    term, _ = built(seen(SHAPES), seen(SHAPES))
    assert not list(term.parameters())
    term, _ = built(seen(SHAPES), seen(SHAPES | {"layer3": (5, 2, 2)}))
    assert [tuple(held.shape) for held in term.parameters()] == [(5, 4, 1, 1)]


def test_one_pair_of_layers_is_refused() -> None:
    one = seen({"layer1": (2, 4, 4)})
    with pytest.raises(ValueError, match=r"got \{'layer1': 'layer1'\}, give at least two pairs"):
        built(one, one)


def test_flow_is_zero_between_maps_that_agree_only_in_their_products() -> None:
    # the same permutation of positions in both layers of a network changes nothing
    student = seen({"layer1": (2, 2, 2), "layer2": (3, 2, 2)})
    moved = {name: held.flip(2, 3) for name, held in student.features.items()}
    teacher = Outputs(student.logits, moved)
    term, batch = built(student, teacher)
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(term(student, teacher, batch), zero, rtol=0, atol=1e-24)
