"""DistillStep: the weighted sum of a run's losses over the student's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from kdcore.losses import LOSSES
from kdcore.losses.logits import cross_entropy, kd
from kdcore.models import MODELS
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.teachers import freeze, heard, taught, taught_together
from kdcore.types import Batch, Probe


@pytest.fixture
def batch() -> Batch:
    plain = Batch(torch.randn(4, 3, 8, 8), torch.tensor([0, 4, 2, 4]), torch.arange(4))
    return next(taught([plain], freeze(Tapped(MODELS["convnet"](5, width=2)))))


def make_step(batch: Batch, weights: Mapping[str, float]) -> DistillStep:
    student = Tapped(MODELS["convnet"](5, width=1)).eval()
    with torch.no_grad():
        probe = Probe(student(batch.image), batch)
    terms = {key: LOSSES[key].build({}, LOSSES[key].default_layers, probe) for key in weights}
    return DistillStep(student, terms, weights)


def test_the_loss_is_the_weighted_sum_of_its_parts(batch: Batch) -> None:
    step = make_step(batch, {"ce": 0.5, "kd": 2.0, "mse": -3.0})
    result, student = step(batch), step.student(batch.image)
    assert batch.teacher is not None
    projected = step.terms["mse"].projectors[0](student.features["embedding"])
    expected = {
        "ce": cross_entropy(student.logits, batch.label),
        "kd": kd(student.logits, batch.teacher.logits),
        "mse": (projected - batch.teacher.features["embedding"]).square().mean(),
    }
    torch.testing.assert_close(dict(result.parts), expected)
    total = 0.5 * expected["ce"] + 2 * expected["kd"] - 3 * expected["mse"]
    torch.testing.assert_close(result.loss, total)
    torch.testing.assert_close(result.logits, student.logits)


def test_the_gradient_is_that_of_the_weighted_sum(batch: Batch) -> None:
    step = make_step(batch, {"ce": 0.5, "kd": 2.0})
    parameters = list(step.student.parameters())
    logits, teacher = step.student(batch.image).logits, batch.teacher
    assert teacher is not None
    total = 0.5 * cross_entropy(logits, batch.label) + 2 * kd(logits, teacher.logits)
    expected = torch.autograd.grad(total, parameters)
    torch.testing.assert_close(torch.autograd.grad(step(batch).loss, parameters), expected)


def test_cross_entropy_is_a_part_of_weight_zero_where_no_term_names_it(batch: Batch) -> None:
    step = make_step(batch, {"mse": 2.0})
    result = step(batch)
    logits = step.student(batch.image).logits
    torch.testing.assert_close(result.parts["ce"], cross_entropy(logits, batch.label))
    torch.testing.assert_close(result.loss, 2 * result.parts["mse"])
    result.loss.backward()
    head = step.student.net.classifier.weight
    torch.testing.assert_close(head.grad, torch.zeros_like(head))
    assert all(parameter.grad is not None for parameter in step.parameters())


def test_a_term_of_weight_zero_is_measured_and_not_followed(batch: Batch) -> None:
    step = make_step(batch, {"ce": 1.0, "mse": 0.0})
    result = step(batch)
    result.loss.backward()
    assert float(result.parts["mse"]) > 0
    projector = step.terms["mse"].projectors[0].weight
    torch.testing.assert_close(projector.grad, torch.zeros_like(projector))
    torch.testing.assert_close(result.loss, result.parts["ce"])


def test_parts_and_logits_are_detached_and_the_loss_is_not(batch: Batch) -> None:
    result = make_step(batch, {"ce": 1.0, "kd": 1.0})(batch)
    assert result.loss.requires_grad
    assert not result.logits.requires_grad
    assert not any(part.requires_grad for part in result.parts.values())


def test_the_step_trains_student_and_projectors_and_saves_both(batch: Batch) -> None:
    step = make_step(batch, {"kd": 1.0, "mse": 1.0})
    names = {name for name, _ in step.named_parameters()}
    assert names == {
        *(f"student.{name}" for name, _ in step.student.named_parameters()),
        "terms.mse.projectors.0.weight",
    }
    assert names <= set(step.state_dict())


@pytest.mark.parametrize("weights", [{"kd": 1.0}, {"kd": 1.0, "ce": 1.0, "mse": 1.0}, {}])
def test_terms_without_weight_and_weights_without_term_are_refused(
    batch: Batch, weights: Mapping[str, float]
) -> None:
    step = make_step(batch, {"kd": 1.0, "ce": 1.0})
    with pytest.raises(ValueError, match=r"terms \['ce', 'kd'\], weights \["):
        DistillStep(step.student, dict(step.terms.items()), weights)


@pytest.mark.parametrize("key", ["mse", "w2"])
def test_a_batch_without_teacher_is_refused_by_a_loss_on_features(batch: Batch, key: str) -> None:
    step = make_step(batch, {key: 1.0})
    with pytest.raises(ValueError, match="needs a teacher, and the batch carries"):
        step(replace(batch, teacher=None))


def test_a_batch_without_teacher_trains_on_its_labels(batch: Batch) -> None:
    step = make_step(batch, {"ce": 1.0})
    alone = step(replace(batch, teacher=None))
    torch.testing.assert_close(alone.loss, step(batch).loss, rtol=0, atol=0)


# --- several teachers -------------------------------------------------------------------------


@pytest.fixture
def pair(batch: Batch) -> Batch:
    """A batch with two teachers of different widths and their average."""
    live = {
        label: freeze(Tapped(MODELS["convnet"](5, width=width)))
        for label, width in (("big", 3), ("small", 2))
    }
    precision = dict.fromkeys(live, torch.float32)
    return next(taught_together([batch], live, precision=precision, space="probabilities"))


def hearing(batch: Batch, teacher: str | None) -> Batch:
    """The batch as one with that teacher only."""
    return replace(batch, teacher=heard(batch, teacher), teachers={})


def listening_step(pair: Batch, listens_to: Mapping[str, str]) -> DistillStep:
    student = Tapped(MODELS["convnet"](5, width=1)).eval()
    terms = {}
    for key in ("kd", "mse", "w2"):
        with torch.no_grad():
            probe = Probe(student(pair.image), hearing(pair, listens_to.get(key)))
        terms[key] = LOSSES[key].build({}, LOSSES[key].default_layers, probe)
    return DistillStep(student, terms, {"kd": 1.0, "mse": 0.5, "w2": 2.0}, listens_to)


@pytest.mark.parametrize("listens_to", [{"mse": "big", "w2": "small"}, {"kd": "small"}])
def test_each_term_is_what_it_would_be_with_its_teacher_alone(
    pair: Batch, listens_to: dict[str, str]
) -> None:
    step = listening_step(pair, {"mse": "small", "w2": "small", **listens_to})
    parameters = list(step.parameters())
    together = torch.autograd.grad(step(pair).loss, parameters)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for key, term in step.terms.items():
        alone = DistillStep(step.student, {key: term}, {key: step.weights[key]})
        result = alone(hearing(pair, step.listens_to.get(key)))
        torch.testing.assert_close(step(pair).parts[key], result.parts[key], rtol=0, atol=0)
        gradient = torch.autograd.grad(result.loss, parameters, materialize_grads=True)
        total = [sum_ + one for sum_, one in zip(total, gradient, strict=True)]
    torch.testing.assert_close(list(together), total)


def test_a_term_that_names_no_teacher_hears_the_average(pair: Batch) -> None:
    step = listening_step(pair, {"mse": "big", "w2": "small"})
    average = sum(said.logits.softmax(dim=1) for said in pair.teachers.values()) / 2
    expected = kd(step.student(pair.image).logits, average.log())
    torch.testing.assert_close(step(pair).parts["kd"], expected)


def test_a_teacher_that_is_not_there_is_refused_by_name(pair: Batch) -> None:
    step = listening_step(pair, {"mse": "big", "w2": "small"})
    with pytest.raises(ValueError, match=r"nothing of teacher 'small'; it has: big"):
        step(replace(pair, teachers={"big": pair.teachers["big"]}))


def test_what_no_term_is_called_cannot_listen(pair: Batch) -> None:
    step = listening_step(pair, {"mse": "big", "w2": "small"})
    with pytest.raises(ValueError, match=r"unknown term 'mes'; did you mean 'mse'\?"):
        DistillStep(step.student, dict(step.terms.items()), step.weights, {"mes": "big"})


def test_losses_see_a_named_teacher_in_full_precision(pair: Batch) -> None:
    step = listening_step(pair, {"mse": "big", "w2": "small"})
    half = {label: outputs.to(torch.bfloat16) for label, outputs in pair.teachers.items()}
    exact = {label: outputs.to(torch.float32) for label, outputs in half.items()}
    here, there = (step(replace(pair, teachers=said)).parts for said in (half, exact))
    torch.testing.assert_close(dict(here), dict(there), rtol=0, atol=0)
