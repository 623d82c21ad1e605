"""A run's networks and its step, from its configuration and the shape of its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcore.losses import LOSSES, Term
from kdcore.schedules import Schedule
from kdcore.step import DistillStep
from kdcore.taps import EMBEDDING, Tapped
from kdcore.teachers import freeze, heard, taught_together, teacher_outputs
from kdcore.terms import present
from kdcore.types import Batch, Outputs, Probe
from pipelines.config import RunConfig, TeacherConfig
from pipelines.data import Reader
from pipelines.formats import check_readable
from pipelines.models import build_network
from pipelines.networks import ModelConfig
from pipelines.sources import Pictures, read_pictures
from pipelines.terms import LossConfig, ScheduleConfig, hyperparameters
from pipelines.views import normalised


def checked(run: RunConfig) -> Pictures:
    """The run's training pictures, once networks, weights and losses have been seen to fit them."""
    pictures = read_pictures(run.data, "train")
    build_step(run, pictures)
    Reader(run, pictures)
    for label, teacher in run.teachers.items():
        with _named(run.called(label)):
            check_readable(teacher.logits, run.hearing(label), num_classes=pictures.num_classes)
        if teacher.run is None:
            layers = run.teacher_layers.get(label, ())
            build_teacher(teacher.network, pictures, layers, place=run.called(label))
        else:
            checked(teacher.run)
    return pictures


def build_student(run: RunConfig, pictures: Pictures) -> Tapped:
    """The student with its taps, initialised from the run's seed."""
    torch.manual_seed(run.seed)
    with _named("student"):
        return Tapped(_network(run.student, pictures), run.student_layers)


def build_teacher(
    model: ModelConfig, pictures: Pictures, layers: Iterable[str], *, place: str = "teacher"
) -> Tapped:
    """The frozen teacher with taps on some layers; errors say that it is of this ``place``."""
    with _named(place):
        return freeze(Tapped(_network(model, pictures), layers))


def teacher_precision(teacher: TeacherConfig) -> torch.dtype:
    """Of the teacher's forward pass, cached or live."""
    return torch.bfloat16 if teacher.precision == "bf16" else torch.float32


def build_step(run: RunConfig, pictures: Pictures) -> DistillStep:
    """Student and weighted terms; a probe of all networks tells the terms their shapes.

    Raises ValueError, naming the loss, where it cannot compare what it is given.
    """
    probe = _probe(run, pictures)
    if run.diagnostics.bounds:
        _check_widths(_hearing(probe, run.diagnostics.teacher))
    student = build_student(run, pictures)
    terms = {}
    # sorted: the order of the file is not part of the run's identity, the first random numbers are
    for label, config in sorted(run.active.items()):
        with _named(f"losses.{label}"):
            terms[label] = _term(run, config, _hearing(probe, config.teacher))
    weights = {label: _weight(run, config) for label, config in run.active.items()}
    named = {label: config.teacher for label, config in run.active.items() if config.teacher}
    return DistillStep(student, terms, weights, named)


def _term(run: RunConfig, config: LossConfig, probe: Probe) -> Term:
    term = LOSSES[config.loss].build(_params(run, config), config.layers, probe).eval()
    # in evaluation mode: blank pictures are not to be remembered
    value = term(probe.student, probe.batch.teacher, probe.batch)
    if not bool(torch.isfinite(value)):
        raise ValueError(f"is {value.item()} for blank pictures; check its params")
    return term.train()


def _hearing(probe: Probe, teacher: str | None) -> Probe:
    """The probe as a term sees it that listens to this teacher."""
    return replace(probe, batch=replace(probe.batch, teacher=heard(probe.batch, teacher)))


def _weight(run: RunConfig, config: LossConfig) -> float | Schedule:
    weight = config.weight
    return weight.over(run.epochs) if isinstance(weight, ScheduleConfig) else weight


def _params(run: RunConfig, config: LossConfig) -> dict[str, Any]:
    """The hyper-parameters as the loss takes them, schedules made for the run's length."""
    checked = hyperparameters(config.loss).model_validate(config.params)
    held = {name: getattr(checked, name) for name in type(checked).model_fields}
    return {
        name: value.over(run.epochs) if isinstance(value, ScheduleConfig) else value
        for name, value in held.items()
    }


def _check_widths(probe: Probe) -> None:
    here, there = (
        outputs.features[EMBEDDING].shape[1]
        for outputs in (probe.student, present(probe.batch.teacher))
    )
    if here != there:
        raise ValueError(
            f"diagnostics.bounds compares embeddings of one width, and the student's is {here}, "
            f"the teacher's {there}; switch it off, or choose networks of one width"
        )


def _probe(run: RunConfig, pictures: Pictures) -> Probe:
    """Two blank pictures through all networks, whose weights do not matter here."""
    blank = torch.zeros(2, *pictures.image.shape[1:], dtype=torch.uint8)
    image = normalised(blank, mean=run.data.mean, std=run.data.std)
    said = {label: _said(run, label, pictures, image) for label in run.heard}
    batch = Batch(image, torch.zeros(2, dtype=torch.int64), torch.arange(2), teachers=said)
    batch = next(taught_together([batch], {}, precision={}, space=run.ensemble))
    student = build_student(run, pictures).eval()
    with torch.no_grad(), _named("student"):
        return Probe(student(image), batch, num_rows=len(pictures.label))


def _said(run: RunConfig, label: str, pictures: Pictures, image: Tensor) -> Outputs:
    """What a teacher's network says before it has its weights."""
    model = run.teachers[label].network.model_copy(update={"weights": None})
    place = run.called(label)
    teacher = build_teacher(model, pictures, run.teacher_layers[label], place=place)
    with _named(place):
        return teacher_outputs(teacher, image)


def _network(model: ModelConfig, pictures: Pictures) -> torch.nn.Module:
    return build_network(
        model, num_classes=pictures.num_classes, in_channels=pictures.image.shape[1]
    )


@contextmanager
def _named(place: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{place}: {error}") from error
