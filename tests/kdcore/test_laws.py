"""What every entry of LOSSES must obey; a new line of the table is tested without a new test."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.losses import LOSSES, Features, Loss, Stateful, Term
from kdcore.models import MODELS
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.types import Batch, Classifier, Mix, Outputs, Probe

MAP = {"map": "map"}
MAPS = {"early": "early", "map": "map"}  # for losses that may see several layers together


@dataclass(frozen=True)
class Case:
    """A loss between a student and a teacher whose layers differ in channels and resolution."""

    loss: Loss
    layers: Mapping[str, str]
    student: Outputs
    batch: Batch

    @property
    def teacher(self) -> Outputs:
        assert self.batch.teacher is not None
        return self.batch.teacher

    def term(self, seed: int = 0, params: Mapping[str, Any] = MappingProxyType({})) -> Term:
        torch.manual_seed(seed)
        probe = Probe(self.student, self.batch, 8)
        return self.loss.build(params, self.layers, probe).double()

    def settled(self, params: Mapping[str, Any] = MappingProxyType({})) -> Term:
        """The term after a batch of training, in evaluation mode: no call changes the next one."""
        term = self.term(params=params)
        self.value(term)
        return term.eval()

    def value(self, term: Term) -> Tensor:
        return term(self.student, self.teacher, self.batch)


def outputs(width: int, early: tuple[int, ...], deep: tuple[int, ...]) -> Outputs:
    """A network whose embedding and deeper map are ``width`` wide."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    features = {"embedding": normal(6, width), "map": normal(6, width, *deep)}
    features["early"] = normal(6, *early)
    return Outputs(normal(6, 5), features, Classifier(normal(5, width), normal(5)))


def make_case(loss: Loss, layers: Mapping[str, str]) -> Case:
    torch.manual_seed(0)
    image = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    label = torch.tensor([0, 3, 1, 3, 4, 0])
    teacher = outputs(4, early=(2, 4, 4), deep=(2, 2))
    batch = Batch(image, label, torch.arange(6), teacher, epoch=2.5)
    return Case(loss, layers, outputs(3, early=(1, 3, 4), deep=(2, 4)), batch)


def leaves(of: Outputs) -> dict[str, Tensor]:
    return {"logits": of.logits, **of.features}


def asking(of: Outputs) -> Outputs:
    features = {name: feature.clone().requires_grad_() for name, feature in of.features.items()}
    return Outputs(of.logits.clone().requires_grad_(), features, of.classifier)


def in_order(of: Outputs, order: Tensor) -> Outputs:
    features = {name: rows[order] for name, rows in of.features.items()}
    return Outputs(of.logits[order], features, of.classifier)


# name: (loss, layers); a loss that takes layers is tested on its default ones and on a pair of maps
CASES = {
    key: (loss, loss.default_layers)
    for key, loss in LOSSES.items()
    if loss.default_layers or not loss.takes_layers
}
CASES |= {
    f"{key}-map": (loss, MAPS if isinstance(loss, Stateful) else MAP)
    for key, loss in LOSSES.items()
    if loss.takes_layers
}
# the mean over consecutive samples, as published: another order has other pairs
OF_AN_ORDER = {"cc_consecutive", "cc_consecutive-map"}
NEED_TEACHER = [name for name, (loss, _) in CASES.items() if loss.needs_teacher]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(*CASES[request.param])


def test_every_loss_is_a_finite_scalar(case: Case) -> None:
    value = case.value(case.term())
    assert value.shape == ()
    assert value.dtype is torch.float64
    assert bool(value.isfinite())


@pytest.mark.parametrize("name", [name for name in CASES if name not in OF_AN_ORDER])
def test_every_loss_ignores_the_order_of_the_batch(name: str) -> None:
    case = make_case(*CASES[name])
    order, term = torch.tensor([3, 0, 5, 1, 4, 2]), case.settled()
    batch, teacher = case.batch, in_order(case.teacher, order)
    rows = (batch.image[order], batch.label[order], batch.index[order])
    shuffled = Batch(*rows, teacher, epoch=batch.epoch)
    value = term(in_order(case.student, order), teacher, shuffled)
    torch.testing.assert_close(value, case.value(term), rtol=1e-12, atol=1e-12)


# what these read of labels is the mean over both of a mixed picture
READ_BOTH_LABELS = {"ce"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in READ_BOTH_LABELS])
def test_a_loss_of_mixed_pictures_reads_no_label_or_refuses(name: str) -> None:
    case = make_case(*CASES[name])
    term = case.settled()
    mix = Mix(torch.tensor([1, 1, 1, 0, 0, 0]), torch.full((6,), 0.5))
    mixed = [
        replace(case.batch, mix=mix, label=label)
        for label in (case.batch.label, case.batch.label.flip(0))
    ]
    try:
        values = [term(case.student, case.teacher, batch) for batch in mixed]
    except ValueError as error:
        assert "leave mixup and cutmix out" in str(error)  # noqa: PT017
        return
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)
    torch.testing.assert_close(values[0], case.value(term), rtol=0, atol=0)


@pytest.mark.usefixtures("without_shape_checks")  # which take most of the time of many evaluations
def test_every_loss_has_the_gradient_of_its_finite_differences(case: Case) -> None:
    # the variance that kdiffusion measures is no part of its graph
    params = {"student_variance": "unit"} if case.loss is LOSSES["kdiffusion"] else {}
    term, student = case.settled(params), asking(case.student)

    def value(logits: Tensor, *features: Tensor) -> Tensor:
        named = dict(zip(case.layers, features, strict=True))
        outputs = Outputs(logits, named, case.student.classifier)
        return term(outputs, case.teacher, case.batch)

    compared = [student.features[layer] for layer in case.layers]
    # a term with networks of its own is slow: one random direction, not every coordinate
    fast = isinstance(case.loss, Stateful)
    assert torch.autograd.gradcheck(value, (student.logits, *compared), fast_mode=fast)


def test_every_loss_sends_a_gradient_to_all_that_it_compares(case: Case) -> None:
    student, teacher = asking(case.student), asking(case.teacher)
    case.term()(student, teacher, replace(case.batch, teacher=teacher)).backward()
    compared = [leaves(student)[name] for name in case.layers or ["logits"]]
    if case.loss.needs_teacher and case.loss is not LOSSES["ab"]:  # whose teacher is a sign
        compared += [leaves(teacher)[name] for name in case.layers.values() or ["logits"]]
    for leaf in compared:
        assert leaf.grad is not None
        assert bool((leaf.grad != 0).any())


def test_every_parameter_of_a_term_receives_a_gradient(case: Case) -> None:
    term = case.term()
    # between different widths a loss on features learns a projector, unless it says otherwise
    if isinstance(case.loss, Features) and case.loss.project:
        assert list(term.parameters())
    term(asking(case.student), case.teacher, case.batch).backward()
    for name, parameter in term.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_every_term_survives_its_state_dict(case: Case) -> None:
    first, second = case.term(seed=1), case.term(seed=2)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(case.value(second), case.value(first), rtol=0, atol=0)


@pytest.mark.parametrize("name", NEED_TEACHER)
def test_a_batch_without_teacher_is_refused(name: str) -> None:
    case = make_case(*CASES[name])
    with pytest.raises(ValueError, match="teacher"):
        case.term()(case.student, None, replace(case.batch, teacher=None))


@pytest.mark.parametrize("name", [name for name in CASES if name not in NEED_TEACHER])
def test_a_loss_that_needs_no_teacher_works_without_one(name: str) -> None:
    case = make_case(*CASES[name])
    value = case.term()(case.student, None, replace(case.batch, teacher=None))
    torch.testing.assert_close(value, case.value(case.term()), rtol=0, atol=0)


def test_every_part_is_finite_float32_under_bfloat16_autocast_and_a_float16_cache(
    case: Case,
) -> None:
    named = {"early": "block2", "map": "block3", "embedding": "embedding"}
    layers = {named[here]: named[there] for here, there in case.layers.items()}
    student = Tapped(MODELS["convnet"](5, width=1), layers)
    teacher = Tapped(MODELS["convnet"](5, width=2), layers.values())
    image = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        batch = Batch(image, case.batch.label, case.batch.index, teacher(image).to(torch.float16))
        term = case.loss.build({}, layers, Probe(student(image), batch, 8)).eval()
    step = DistillStep(student, {"it": term}, {"it": 1.0})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, seen = step(batch), student(image)
    alone = term(seen.to(torch.float32), batch.teacher.to(torch.float32), batch)
    torch.testing.assert_close(result.parts["it"], alone.detach())  # nothing of it in bfloat16
    result.loss.backward()
    assert result.logits.dtype is torch.bfloat16
    for part in (result.loss, *result.parts.values()):
        assert part.dtype is torch.float32
        assert bool(part.isfinite())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in step.parameters())


@pytest.mark.parametrize("key", LOSSES)
def test_every_hyperparameter_has_a_default_and_a_type(key: str) -> None:
    loss, known = LOSSES[key], {"student", "teacher", "label", "teacher_classifier"}
    if isinstance(loss, Stateful):
        known = {"layers", "probe"}
    elif loss.takes_layers:
        shared = ("logits", "classifier")
        known |= {f"{network}_{held}" for network in ("student", "teacher") for held in shared}
    assert set(loss.inputs) <= known
    for name, parameter in LOSSES[key].hyperparameters.items():
        assert parameter.default is not inspect.Parameter.empty, name
        assert parameter.annotation is not inspect.Parameter.empty, name
