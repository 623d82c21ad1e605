"""The teacher's map as predicted from the student's: FitNets, VID, SimKD."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor

from kdcore.losses import LOSSES, Term
from kdcore.losses.hints import bottleneck, gaussian_nll
from kdcore.models import MODELS
from kdcore.reuse import ReusedClassifier
from kdcore.taps import Tapped
from kdcore.types import Batch, Outputs, Probe

LAYERS = {"map": "map"}


def networks(*maps: tuple[int, ...]) -> tuple[Outputs, Outputs, Batch]:
    """A student's and a teacher's map, and the batch that goes with them."""
    student, teacher = (
        Outputs(torch.randn(4, 5), {"map": torch.randn(4, *shape, dtype=torch.float64)})
        for shape in maps
    )
    return student, teacher, Batch(torch.randn(4, 3, 8, 8), torch.arange(4), torch.arange(4))


def built(key: str, student: Outputs, teacher: Outputs, batch: Batch, **params: float) -> Term:
    probe = Probe(student, Batch(batch.image, batch.label, batch.index, teacher))
    return LOSSES[key].build(params, LAYERS, probe).double()


def exactly_zero(gradient: Tensor) -> None:
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_fitnet_is_least_at_the_error_of_linear_regression() -> None:
    seen = networks((3, 2, 2), (2, 2, 2))
    rows, targets = (outputs.features["map"].movedim(1, -1).flatten(0, 2) for outputs in seen[:2])
    solution = torch.linalg.lstsq(rows, targets).solution
    term = built("fitnet", *seen)
    weight = term.maps.connectors[0].weight
    weight.data = solution.T[:, :, None, None].contiguous()
    value = term(*seen)
    torch.testing.assert_close(value, (targets - rows @ solution).square().mean())
    exactly_zero(torch.autograd.grad(value, weight)[0])


def test_fitnet_learns_its_regressor_where_the_channels_agree_too() -> None:
    assert len(list(built("fitnet", *networks((3, 2, 2), (3, 2, 2))).parameters())) == 1


def test_the_likelihood_equals_its_loop() -> None:
    student, teacher = torch.randn(2, 2, 3, 1, 2, dtype=torch.float64)
    spread = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    expected = 0.0
    for b in range(2):
        for c in range(3):
            for w in range(2):
                error = float(student[b, c, 0, w] - teacher[b, c, 0, w])
                v = log(1 + exp(float(spread[c]))) + 0.01
                expected += (error**2 / v + log(v)) / 2 / 12
    value = gaussian_nll(student, teacher, spread, eps=0.01)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_vid_starts_at_its_initial_variance() -> None:
    seen = networks((3, 2, 2), (2, 2, 2))
    term = built("vid", *seen, initial_variance=2.0)
    made = term.maps.connectors[0](seen[0].features["map"])
    error = (made - seen[1].features["map"]).square().mean()
    torch.testing.assert_close(term(*seen), (error / 2 + log(2)) / 2, rtol=1e-6, atol=0)


def test_vid_trains_its_variance_towards_the_mean_squared_error_of_each_channel() -> None:
    seen = networks((3, 2, 2), (2, 2, 2))
    term = built("vid", *seen)
    (spread,) = term.spreads
    assert bool((torch.autograd.grad(term(*seen), spread)[0] > 0).all())  # 5 is too much
    error = term.maps.connectors[0](seen[0].features["map"]) - seen[1].features["map"]
    spread.data = (error.square().mean(dim=(0, 2, 3)) - term.eps).expm1().log().detach()
    exactly_zero(torch.autograd.grad(term(*seen), spread)[0])


def test_vid_refuses_an_initial_variance_that_softplus_cannot_give() -> None:
    with pytest.raises(ValueError, match="initial_variance must be above eps"):
        built("vid", *networks((3, 2, 2), (2, 2, 2)), initial_variance=0.0)


def test_the_bottleneck_narrows_and_widens_and_pools_larger_maps() -> None:
    made = bottleneck((4, 3, 8, 8), (4, 6, 4, 2))
    shapes = [tuple(held.shape) for held in made.parameters() if held.ndim == 4]
    assert shapes == [(3, 3, 1, 1), (3, 3, 3, 3), (6, 3, 1, 1)]
    assert made(torch.randn(4, 3, 8, 8)).shape == (4, 6, 4, 2)
    assert bool((made(torch.randn(4, 3, 8, 8)) >= 0).all())


@pytest.fixture
def pair() -> tuple[Tapped, Tapped]:
    student = Tapped(MODELS["convnet"](5, width=1), ["block3"]).eval()
    return student, Tapped(MODELS["convnet"](5, width=2), ["block3"]).eval()


def test_a_student_with_the_teacher_s_map_has_the_teacher_s_logits(
    pair: tuple[Tapped, Tapped],
) -> None:
    _, teacher = pair
    image = torch.randn(3, 3, 8, 8)
    reused = ReusedClassifier(teacher.net, "block3", torch.nn.Identity(), teacher.head)
    torch.testing.assert_close(reused(image), teacher(image).logits)


def test_a_reused_classifier_stands_behind_a_bottleneck_that_simkd_trains(
    pair: tuple[Tapped, Tapped],
) -> None:
    student, teacher = pair
    image = torch.randn(3, 3, 8, 8)
    taught = teacher(image)
    shapes = [outputs.features["block3"].shape for outputs in (student(image), taught)]
    between = bottleneck(*shapes)
    net = ReusedClassifier(student.net, "block3", between, teacher.head)
    tapped = Tapped(net, ["projector"])
    seen = tapped(image)
    batch = Batch(image, torch.arange(3), torch.arange(3), taught)
    term = LOSSES["simkd"].build({}, {"projector": "block3"}, Probe(seen, batch))
    assert not list(term.parameters())
    difference = seen.features["projector"] - taught.features["block3"]
    value = term(seen, taught, batch)
    torch.testing.assert_close(value, difference.square().mean())
    torch.testing.assert_close(tapped.head, teacher.head)
    value.backward()
    trained = {name for name, held in tapped.named_parameters() if held.grad is not None}
    assert trained == {name for name, held in tapped.named_parameters() if held.requires_grad}
    assert {name.split(".")[1] for name in trained} == {"student", "projector"}
