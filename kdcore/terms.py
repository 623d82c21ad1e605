"""What a loss is to the rest: a line of the table, and the module it becomes for one run."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from kdcore.checks import unknown_name
from kdcore.projectors import projector, same_resolution
from kdcore.rows import gather_rows
from kdcore.schedules import at
from kdcore.taps import EMBEDDING
from kdcore.types import Batch, Outputs, Probe


class Term(nn.Module, ABC):
    """One loss of one run, with its hyper-parameters and whatever it learns or remembers."""

    @abstractmethod
    def forward(
        self, student: Outputs, teacher: Outputs | None, batch: Batch
    ) -> Float[Tensor, ""]: ...


@dataclass(frozen=True)
class Loss(ABC):
    """One line of ``LOSSES``: what the loss compares, what it needs, how its term is made.

    The signature of ``function`` is the schema: its positional parameters come from the run, its
    keyword-only ones from the configuration. ``weight`` is the one the literature uses.
    ``batch_level`` says that samples are compared with each other, so that under DDP the rows of
    all workers are gathered first, ``mixes`` that its ``label`` may be the shares of classes that
    mixed pictures have; the others refuse these.
    """

    function: Callable[..., Any]
    batch_level: bool = field(default=False, kw_only=True)
    mixes: bool = field(default=False, kw_only=True)
    weight: float = field(default=1.0, kw_only=True)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The positional parameters of the function."""
        return tuple(
            name
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        )

    @property
    def hyperparameters(self) -> Mapping[str, inspect.Parameter]:
        """The keyword-only parameters of the function, with types and defaults."""
        parameters = inspect.signature(self.function, eval_str=True).parameters
        return {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }

    @property
    @abstractmethod
    def needs_teacher(self) -> bool: ...

    @property
    @abstractmethod
    def takes_layers(self) -> bool:
        """Whether a run may name pairs of layers."""

    @property
    def needs_one_teacher(self) -> bool:
        """Whether it asks for layers or the classifier, which an average of teachers lacks."""
        return self.takes_layers or "teacher_classifier" in self.inputs

    @property
    @abstractmethod
    def default_layers(self) -> Mapping[str, str]:
        """Student layer to teacher layer where the run names none; empty where it must."""

    @abstractmethod
    def build(self, params: Mapping[str, Any], layers: Mapping[str, str], probe: Probe) -> Term:
        """The term for one run; raises ValueError where the probe's shapes do not suit."""


@dataclass(frozen=True)
class Logits(Loss):
    """A function of ``student``, ``teacher`` and ``label``: the logits of both networks.

    The function may also ask for ``teacher_classifier``.
    """

    @property
    def needs_teacher(self) -> bool:
        return "teacher" in self.inputs

    @property
    def takes_layers(self) -> bool:
        return False

    @property
    def default_layers(self) -> Mapping[str, str]:
        return {}

    def build(self, params: Mapping[str, Any], layers: Mapping[str, str], probe: Probe) -> Term:
        return _LogitsTerm(self, params)


@dataclass(frozen=True)
class Features(Loss):
    """A function of one feature of each network, summed over the pairs of layers of the run.

    The function may also ask for ``label``, ``student_logits``, ``teacher_logits``,
    ``student_classifier`` and ``teacher_classifier``. Where the channels differ a projector of the
    student's is made and trained with it, unless ``project`` is false because the function compares
    any two widths. ``layers`` is empty for functions of maps: these have no layer that every
    network has.
    """

    project: bool = field(default=True, kw_only=True)
    layers: Mapping[str, str] = field(default_factory=lambda: {EMBEDDING: EMBEDDING}, kw_only=True)

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def takes_layers(self) -> bool:
        return True

    @property
    def default_layers(self) -> Mapping[str, str]:
        return self.layers

    def build(self, params: Mapping[str, Any], layers: Mapping[str, str], probe: Probe) -> Term:
        return _FeaturesTerm(self, params, layers, probe)


@dataclass(frozen=True)
class Stateful(Loss):
    """A loss that learns or remembers something: a final ``Term``.

    ``function`` is its class, made with ``(probe, **params)``, or ``(layers, probe, **params)``
    where it asks for ``layers``; it gathers rows itself where it compares samples with each other.
    """

    function: type[Term]
    layers: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def takes_layers(self) -> bool:
        return "layers" in self.inputs

    @property
    def default_layers(self) -> Mapping[str, str]:
        return self.layers

    def build(self, params: Mapping[str, Any], layers: Mapping[str, str], probe: Probe) -> Term:
        if not self.takes_layers:
            return self.function(probe, **params)
        if not layers:
            raise ValueError("this loss needs at least one pair of layers")
        return self.function(layers, probe, **params)


def present(teacher: Outputs | None) -> Outputs:
    """The teacher's outputs; ValueError where the batch carries none."""
    if teacher is None:
        raise ValueError("this loss needs a teacher, and the batch carries no teacher's outputs")
    return teacher


def one_label(batch: Batch, *, instead: str = "") -> Int[Tensor, " b"]:
    """The label of each picture; ValueError where pictures are mixed and have two.

    ``instead`` is what else the message advises.
    """
    if batch.mix is not None:
        raise ValueError(
            "this loss reads one label of each picture, and these are mixed of two: leave mixup "
            f"and cutmix out, or take a loss without labels{instead}"
        )
    return batch.label


def feature_of(network: str, outputs: Outputs, layer: str) -> Tensor:
    """A layer's feature; ValueError where the network (named in the message) has none such."""
    if not outputs.features:
        raise ValueError(
            f"layer {layer!r} is asked of the {network}, which gives logits only here, as the "
            "average of several teachers does; name one of them"
        )
    if layer not in outputs.features:
        raise ValueError(unknown_name(f"layer of the {network}", layer, outputs.features))
    return outputs.features[layer]


class _FunctionTerm(Term):
    """What the terms of stateless functions share: which inputs, and whether rows are gathered.

    A hyper-parameter may be a ``Schedule``.
    """

    def __init__(self, loss: Loss, params: Mapping[str, Any]) -> None:
        super().__init__()
        self._function, self._params = loss.function, dict(params)
        self._inputs = loss.inputs
        self._batch_level, self._mixes = loss.batch_level, loss.mixes
        # classes may be the teacher's predictions instead, of any picture
        self._reads_label = "label" in loss.inputs and params.get("labels") != "teacher"
        self._instead = ", or `labels: teacher`" if "labels" in loss.hyperparameters else ""

    def label_of(self, batch: Batch, num_classes: int) -> Tensor:
        """What the function gets as ``label``; ValueError where it cannot read that of a mix."""
        if self._mixes:
            return batch.target(num_classes)
        return one_label(batch, instead=self._instead) if self._reads_label else batch.label

    def compare(self, values: Mapping[str, Any], epoch: float) -> Tensor:
        chosen = [values[name] for name in self._inputs]
        if self._batch_level:
            # a classifier has no rows: it is the same on every worker
            chosen = [gather_rows(it) if isinstance(it, Tensor) else it for it in chosen]
        params = {name: at(held, epoch) for name, held in self._params.items()}
        value: Tensor = self._function(*chosen, **params)
        return value


class _LogitsTerm(_FunctionTerm):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        label = self.label_of(batch, student.logits.shape[1])
        values: dict[str, Any] = {"student": student.logits, "label": label}
        if "teacher" in self._inputs:
            taught = present(teacher)
            values |= {"teacher": taught.logits, "teacher_classifier": taught.classifier}
        return self.compare(values, batch.epoch)


class _FeaturesTerm(_FunctionTerm):
    def __init__(
        self, loss: Features, params: Mapping[str, Any], layers: Mapping[str, str], probe: Probe
    ) -> None:
        super().__init__(loss, params)
        if not layers:
            raise ValueError("a loss on features needs at least one pair of layers")
        self._layers = dict(layers)
        self.projectors = nn.ModuleList(
            self._projector(loss, probe, student, teacher) for student, teacher in layers.items()
        )

    @staticmethod
    def _projector(loss: Features, probe: Probe, student: str, teacher: str) -> nn.Module:
        here = feature_of("student", probe.student, student)
        there = feature_of("teacher", present(probe.batch.teacher), teacher)
        if not loss.project:
            return nn.Identity()
        try:
            return projector(here.shape, there.shape)
        except ValueError as error:
            raise ValueError(f"layers {student!r}: {teacher!r}: {error}") from None

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        taught = present(teacher)
        shared = {
            "label": self.label_of(batch, student.logits.shape[1]),
            "student_logits": student.logits,
            "teacher_logits": taught.logits,
            "student_classifier": student.classifier,
            "teacher_classifier": taught.classifier,
        }
        lacking = [name for name in self._inputs if shared.get(name, name) is None]
        if lacking:
            network, _, part = lacking[0].partition("_")
            raise ValueError(f"this loss needs the {network}'s {part}, and its outputs carry none")
        total = batch.image.new_zeros(())
        for (here, there), project in zip(self._layers.items(), self.projectors, strict=True):
            pair = same_resolution(project(student.features[here]), taught.features[there])
            values = shared | {"student": pair[0], "teacher": pair[1]}
            total = total + self.compare(values, batch.epoch)
        return total
