"""A run's networks and its step, from its configuration and the shape of its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.losses import Term
from kdcore.schedules import Schedule
from kdcore.step import DistillStep
from kdcore.taps import EMBEDDING, Tapped
from kdcore.teachers import freeze, heard, taught_together, teacher_outputs
from kdcore.terms import present
from kdcore.types import Batch, Classifier, Mix, Outputs, Probe
from pipelines.config import RunConfig, TeacherConfig
from pipelines.custom_losses import loss_line
from pipelines.data import Reader
from pipelines.formats import check_readable
from pipelines.models import build_network, load_weights
from pipelines.networks import ModelConfig
from pipelines.sources import Pictures, read_pictures
from pipelines.students import as_trained, as_used, layer_names, layer_of
from pipelines.synthetic import method_of, synthetic_batches, taught_by
from pipelines.terms import LossConfig, ScheduleConfig, hyperparameters
from pipelines.views import normalised


def checked(run: RunConfig) -> Pictures:
    """The run's training pictures, once networks, weights and losses have been seen to fit them."""
    pictures = read_pictures(run.data, "train")
    if run.data.test is not None:
        _check_test(read_pictures(run.data, "test"), pictures)
    build_step(run, pictures)
    Reader(run, pictures)
    for label, teacher in run.teachers.items():
        with _named(run.called(label)):
            check_readable(teacher.logits, run.hearing(label), num_classes=pictures.num_classes)
        if teacher.run is None:
            layers = run.teacher_layers.get(label, ())
            build_teacher(teacher, pictures, layers, place=run.called(label))
        else:
            checked(teacher.run)
    if run.synthetic is not None:
        _check_synthetic(run, pictures)
    return pictures


def _check_test(test: Pictures, pictures: Pictures) -> None:
    """That another dataset's test part is of the same classes and shape."""
    here, there = (
        f"{held.num_classes} classes of shape {tuple(held.image.shape[1:])}"
        for held in (test, pictures)
    )
    if here != there:
        raise ValueError(
            f"data.test has {here}, and the training pictures {there}; set data.size where they "
            "are of other sizes, or name another dataset"
        )


def _check_synthetic(run: RunConfig, pictures: Pictures) -> None:
    """That the method can make pictures of this shape from such a teacher."""
    teacher = _blank_teacher(run, taught_by(run), pictures)
    with _named(f"synthetic.{method_of(run).method}"):
        synthetic_batches(run, build_student(run, pictures), teacher, pictures.image.shape[1:])


def build_student(
    run: RunConfig,
    pictures: Pictures,
    classifiers: Mapping[str, Classifier] = MappingProxyType({}),
) -> Tapped:
    """The student as it is trained, with its taps, initialised from the run's seed.

    ``classifiers`` are those of the teachers, by label, for a student that reuses one; without them
    it has one of the right shape.
    """
    image = _blank(run, pictures)
    said = _joined_teacher(run, pictures, image, classifiers)
    torch.manual_seed(run.seed)
    with _named("student"):
        net = as_trained(run.student, _network(run.student, pictures), image, said)
        for name in run.optimizer.multipliers:
            layer_of(net, name)
        return Tapped(net, run.student_layers, aliases=layer_names(net))


def build_used(run: RunConfig, pictures: Pictures, weights: Path | None) -> nn.Module:
    """The student as it is used after training, in evaluation mode; blank without weights."""
    net = build_student(run, pictures).net
    if weights is not None:
        load_weights(net, weights)
    return as_used(net)


def build_teacher(
    teacher: TeacherConfig,
    pictures: Pictures,
    layers: Iterable[str],
    *,
    weights: Path | None = None,
    place: str = "teacher",
) -> Tapped:
    """The frozen teacher with taps on some layers; errors say that it is of this ``place``.

    ``weights`` are those of the run whose student it is, if it is one.
    """
    with _named(place):
        if teacher.run is not None:
            net = build_used(teacher.run, pictures, weights)
        else:
            net = _network(teacher.network, pictures)
        return freeze(Tapped(net, layers, aliases=layer_names(net)))


def teacher_precision(teacher: TeacherConfig) -> torch.dtype:
    """Of the teacher's forward pass, cached or live."""
    return torch.bfloat16 if teacher.precision == "bf16" else torch.float32


def build_step(
    run: RunConfig,
    pictures: Pictures,
    classifiers: Mapping[str, Classifier] = MappingProxyType({}),
) -> DistillStep:
    """Student and weighted terms; a probe of all networks tells the terms their shapes.

    ``classifiers`` are of the teachers, as ``build_student`` takes them.

    Raises ValueError, naming the loss, where it cannot compare what it is given.
    """
    probe = probe_of(run, pictures)
    if run.diagnostics.bounds:
        _check_widths(_hearing(probe, run.diagnostics.teacher))
    student = build_student(run, pictures, classifiers)
    terms = {}
    # sorted: the order of the file is not part of the run's identity, the first random numbers are
    for label, config in sorted(run.active.items()):
        with _named(f"losses.{label}"):
            terms[label] = _term(run, config, _hearing(probe, config.teacher))
    weights = {label: _weight(run, config) for label, config in run.active.items()}
    named = {label: config.teacher for label, config in run.active.items() if config.teacher}
    return DistillStep(student, terms, weights, named)


def _term(run: RunConfig, config: LossConfig, probe: Probe) -> Term:
    term = loss_line(config.loss).build(_params(run, config), config.layers, probe).eval()
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


def probe_of(run: RunConfig, pictures: Pictures) -> Probe:
    """Two blank pictures through all networks, whose weights do not matter here."""
    image = _blank(run, pictures)
    said = {label: _said(run, label, pictures, image) for label in run.heard}
    label = torch.zeros(2, dtype=torch.int64)
    mix = Mix(label, torch.full((2,), 0.5)) if run.data.augment.mixes else None
    batch = Batch(image, label, torch.arange(2), teachers=said, mix=mix)
    batch = next(taught_together([batch], {}, precision={}, space=run.ensemble))
    student = build_student(run, pictures).eval()
    with torch.no_grad(), _named("student"):
        # nobody knows how many pictures will be made
        num_rows = len(pictures.label) if run.synthetic is None else 0
        return Probe(student(image), batch, num_rows=num_rows)


def _said(run: RunConfig, label: str, pictures: Pictures, image: Tensor) -> Outputs:
    """What a teacher's network says before it has its weights."""
    tapped = _blank_teacher(run, label, pictures)
    with _named(run.called(label)):
        return teacher_outputs(tapped, image)


def _blank_teacher(run: RunConfig, label: str, pictures: Pictures) -> Tapped:
    """A teacher's network before it has its weights."""
    teacher = run.teachers[label].model_copy(update={"weights": None})
    layers = run.teacher_layers[label]
    return build_teacher(teacher, pictures, layers, place=run.called(label))


def _joined_teacher(
    run: RunConfig, pictures: Pictures, image: Tensor, classifiers: Mapping[str, Classifier]
) -> Outputs | None:
    """What the teacher says whose shapes the student takes up, with its own classifier if given."""
    for joined in run.student.joins.values():
        label = joined.teacher or next(iter(run.heard))
        said = _said(run, label, pictures, torch.randn_like(image))
        return replace(said, classifier=classifiers.get(label, said.classifier))
    return None


def _blank(run: RunConfig, pictures: Pictures) -> Tensor:
    """Two blank pictures as the student sees them."""
    pixels = torch.zeros(2, *pictures.image.shape[1:], dtype=torch.uint8)
    return normalised(pixels, mean=run.data.mean, std=run.data.std)


def _network(model: ModelConfig, pictures: Pictures) -> nn.Module:
    return build_network(
        model, num_classes=pictures.num_classes, in_channels=pictures.image.shape[1]
    )


@contextmanager
def _named(place: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{place}: {error}") from error
