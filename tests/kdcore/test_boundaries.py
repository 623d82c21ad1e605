"""Maps from before a ReLU: boundaries, partial distance, and margins from a cache."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from kdcore.losses import LOSSES, Term
from kdcore.losses.boundaries import (
    activation_boundary,
    gaussian_margin,
    halving_sum,
    partial_distance,
)
from kdcore.types import Batch, Outputs, Probe


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def seen(*maps: Tensor) -> Outputs:
    features = {f"layer{number}": held for number, held in enumerate(maps, 1)}
    return Outputs(torch.randn(len(maps[0]), 5), features)


def built(key: str, student: Outputs, teacher: Outputs) -> tuple[Term, Batch]:
    rows = torch.arange(len(student.logits))
    batch = Batch(torch.randn(len(rows), 3, 8, 8), rows, rows, teacher)
    layers = {layer: layer for layer in student.features}
    return LOSSES[key].build({}, layers, Probe(student, batch)).double(), batch


def test_activation_boundary_equals_its_loop() -> None:
    student, teacher = torch.randn(2, 2, 3, 1, 2, dtype=torch.float64) * 2
    for margin in (0.5, 1.0):
        expected = 0.0
        for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
            expected += (max(0, margin - s) if t > 0 else max(0, s + margin)) ** 2 / 2
        value = activation_boundary(student, teacher, margin=margin)
        torch.testing.assert_close(value, scalar(expected))


def test_activation_boundary_counts_signs_alone() -> None:
    student, teacher = torch.randn(2, 2, 3, 1, 2, dtype=torch.float64)
    value = activation_boundary(student, teacher)
    torch.testing.assert_close(activation_boundary(student, teacher.sign() * 7), value)
    torch.testing.assert_close(activation_boundary(teacher.sign() * 7, teacher), scalar(0.0))


def test_partial_distance_equals_its_loop() -> None:
    student, teacher = torch.randn(2, 2, 3, 2, 3, dtype=torch.float64)
    margin = torch.tensor([-0.5, -1.0, -0.1], dtype=torch.float64)
    expected = 0.0
    for b in range(2):
        for c in range(3):
            m = float(margin[c])
            cells = zip(
                student[b, c].flatten().tolist(), teacher[b, c].flatten().tolist(), strict=True
            )
            for s, t in cells:
                if t > 0:
                    expected += (s - t) ** 2 / 2
                elif t > m:
                    expected += (s - t) ** 2 / 2 if s > t else 0
                else:
                    expected += (s - m) ** 2 / 2 if s > m else 0
    torch.testing.assert_close(partial_distance(student, teacher, margin), scalar(expected))


def test_the_gaussian_margin_is_the_mean_of_a_truncated_gaussian() -> None:
    weight, bias = torch.tensor([1.0, -0.5, 2.0]).double(), torch.tensor([0.3, -0.2, 0.0]).double()
    expected = [
        stats.truncnorm.mean(-float("inf"), -b / abs(w), loc=b, scale=abs(w))
        for w, b in zip(weight.tolist(), bias.tolist(), strict=True)
    ]
    torch.testing.assert_close(gaussian_margin(weight, bias), torch.tensor(expected).double())


def test_a_channel_that_is_hardly_ever_negative_has_a_margin_of_three_deviations() -> None:
    margin = gaussian_margin(torch.tensor([0.5, 0.0]), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(margin, torch.tensor([-1.5, 0.0]))


def test_the_deepest_layer_counts_in_full_and_each_before_it_half() -> None:
    values = [scalar(8.0), scalar(4.0), scalar(1.0)]
    torch.testing.assert_close(halving_sum(values), scalar(8 / 4 + 4 / 2 + 1))


@pytest.mark.parametrize("key", ["ab", "ofd"])
def test_layers_are_weighed_by_depth_not_by_name(key: str) -> None:
    large, small = torch.randn(2, 4, 2, 4, 4).double(), torch.randn(2, 4, 2, 2, 2).double()
    teacher, student = seen(small[0], large[0]), seen(small[1], large[1])  # layer2 is shallow
    term, batch = built(key, student, teacher)
    value = term(student, teacher, batch)
    parts = []
    for layer in ("layer1", "layer2"):
        one, other = (Outputs(of.logits, {layer: of.features[layer]}) for of in (student, teacher))
        alone, rows = built(key, one, other)
        parts.append(alone(one, other, rows))
    torch.testing.assert_close(value, parts[0] + parts[1] / 2)


def test_margins_are_the_mean_negative_responses_of_all_batches_so_far() -> None:
    batches = [seen(torch.randn(size, 3, 2, 2).double()) for size in (4, 1, 6)]
    batches.append(seen(torch.rand(2, 3, 2, 2).double()))  # nothing negative: nothing learned
    student = seen(torch.randn(4, 3, 2, 2).double())
    term, batch = built("ofd", student, batches[0])
    for teacher in batches:
        rows = len(teacher.logits)
        few = seen(torch.randn(rows, 3, 2, 2).double())
        term(few, teacher, batch)
    (held,) = term.margins
    everything = torch.cat([teacher.features["layer1"] for teacher in batches])
    channels = everything.movedim(1, 0).flatten(1)
    expected = torch.stack([channel[channel < 0].mean() for channel in channels])
    torch.testing.assert_close(held.mean, expected)
    torch.testing.assert_close(held.count, (channels < 0).sum(dim=1))


def test_margins_of_a_batch_norm_are_found_from_its_outputs() -> None:
    weight, bias = torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, -0.2]).double()
    normal = torch.randn(400, 2, 10, 10, dtype=torch.float64)
    teacher = seen(normal * weight[:, None, None] + bias[:, None, None])
    term, batch = built("ofd", teacher, teacher)
    term(teacher, teacher, batch)
    torch.testing.assert_close(
        term.margins[0].mean, gaussian_margin(weight, bias), rtol=0.02, atol=0
    )


def test_margins_stay_in_evaluation_and_are_saved() -> None:
    teacher, student = (
        seen(torch.randn(4, 3, 2, 2).double()),
        seen(torch.randn(4, 3, 2, 2).double()),
    )
    term, batch = built("ofd", student, teacher)
    term(student, teacher, batch)
    before = {name: held.clone() for name, held in term.state_dict().items()}
    assert set(before) == {"margins.0.mean", "margins.0.count"}
    term.eval()(student, seen(teacher.features["layer1"] * 9), batch)
    torch.testing.assert_close(dict(term.state_dict()), before)


def test_a_student_below_the_margin_is_left_alone() -> None:
    teacher = torch.full((2, 3, 2, 2), -4.0)
    student = torch.full((2, 3, 2, 2), -5.0, requires_grad=True)
    value = partial_distance(student, teacher, torch.tensor([-4.5, -1.0, -0.5]))
    value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor(0.0))
    torch.testing.assert_close(student.grad, torch.zeros_like(student))
