"""Unusual batches: every entry of LOSSES gives a finite loss and a gradient of sane size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kdcore.types import Classifier, Outputs
from tests.kdcore.test_laws import CASES, Case, asking, make_case

Edge = Callable[[Case], Case]


def both(case: Case, change: Callable[[Outputs], Outputs]) -> Case:
    batch = replace(case.batch, teacher=change(case.teacher))
    return replace(case, student=change(case.student), batch=batch)


def scaled(of: Outputs, logits: float, features: float) -> Outputs:
    held = {layer: feature * features for layer, feature in of.features.items()}
    return Outputs(of.logits * logits, held, of.classifier)


def of_two_classes(of: Outputs) -> Outputs:
    assert of.classifier is not None
    classifier = Classifier(of.classifier.weight[:2], of.classifier.bias[:2])
    return Outputs(of.logits[:, :2], of.features, classifier)


def first_sample(of: Outputs) -> Outputs:
    held = {layer: feature[:1] for layer, feature in of.features.items()}
    return Outputs(of.logits[:1], held, of.classifier)


def two_classes(case: Case) -> Case:
    case = both(case, of_two_classes)
    return replace(case, batch=replace(case.batch, label=case.batch.label % 2))


def batch_of_one(case: Case) -> Case:
    case = both(case, first_sample)
    rows = {name: getattr(case.batch, name)[:1] for name in ("image", "label", "index")}
    return replace(case, batch=replace(case.batch, **rows))


def only_one_class_present(case: Case) -> Case:
    label = torch.full_like(case.batch.label, 3)
    return replace(case, batch=replace(case.batch, label=label))


def zero_student(case: Case) -> Case:
    return replace(case, student=scaled(case.student, 0, 0))


def zero_teacher(case: Case) -> Case:
    teacher = scaled(case.teacher, 0, 0)
    return replace(case, batch=replace(case.batch, teacher=teacher))


def zero_both(case: Case) -> Case:
    return both(case, lambda of: scaled(of, 0, 0))


def logits_of_thousands(case: Case) -> Case:
    return both(case, lambda of: scaled(of, 5000, 1))


EDGES: list[Edge] = [
    two_classes,
    batch_of_one,
    only_one_class_present,
    zero_student,
    zero_teacher,
    zero_both,
    logits_of_thousands,
]


@pytest.mark.usefixtures("without_shape_checks")  # which take most of the time
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
@pytest.mark.parametrize("name", CASES)
def test_an_unusual_batch_has_a_finite_loss_and_a_sane_gradient(name: str, edge: Edge) -> None:
    case = edge(make_case(*CASES[name]))
    term, student = case.term().float(), asking(case.student.to(torch.float32))
    value = term(student, case.teacher.to(torch.float32), case.batch)
    value.backward()
    assert bool(value.isfinite())
    leaves = [student.logits, *student.features.values(), *term.parameters()]
    for leaf in leaves:
        # dist has 5e6 where a student finds all classes alike, a unit row of zeros had 1e12
        assert leaf.grad is None or float(leaf.grad.abs().max()) < 1e7
