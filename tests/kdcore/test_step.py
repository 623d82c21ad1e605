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
from kdcore.teachers import freeze, taught
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
