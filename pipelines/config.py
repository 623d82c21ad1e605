"""What a run is: every value checked, every default filled in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kdcore.checks import unknown_name
from kdcore.taps import EMBEDDING
from kdcore.teachers import Ensemble
from pipelines.custom_losses import FLAG, is_custom, loss_line
from pipelines.datasets import DataConfig, compared
from pipelines.digests import file_digest
from pipelines.formats import LogitsFormat, TopConfig
from pipelines.identity import identity_of
from pipelines.methods import AGREEMENT, SyntheticConfig
from pipelines.networks import ModelConfig, StudentConfig
from pipelines.optimizer import OptimizerConfig
from pipelines.strict import Strict
from pipelines.terms import LossConfig
from pipelines.workers import check_shares


class TeacherConfig(Strict):
    """A network with weights, or (``run``) the best student of another run, trained if need be."""

    label: str | None = None  # by which terms name it; its network's or its run's name without it
    name: str | None = None
    weights: Path | None = None
    params: dict[str, Any] = {}
    stem: Literal["original", "small"] = "original"
    run: RunConfig | None = None
    source: Literal["cached", "live"] = "cached"
    precision: Literal["fp32", "bf16"] = "fp32"  # of the teacher's forward pass
    logits: LogitsFormat = "float16"  # how a cache keeps them: or uint8, or {top: 10}

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        given = {"name", "weights", "params", "stem"} & self.model_fields_set
        named = self.name is not None and self.weights is not None
        own = any(getattr(self, key) != type(self).model_fields[key].default for key in given)
        if (self.run is None and not named) or (self.run is not None and own):
            raise ValueError(
                "a teacher is either `name: NETWORK` with `weights: FILE`, or `run: RUN.yaml`, "
                "whose best student it is"
            )
        if self.source == "live" and self.logits != "float16":
            raise ValueError("logits: how a cache keeps them, and the teacher's source is live")
        _ = self.network
        return self

    @property
    def title(self) -> str:
        """Its label, which is the name of its network or of its run unless it is given."""
        return self.label or (str(self.name) if self.run is None else self.run.name)

    @property
    def identity_content(self) -> dict[str, Any]:
        """Every value that decides what it says: weights by content, a run by its identity."""
        own = {"weights": file_digest(self.weights), "run": self.run and self.run.identity}
        content = self.model_dump(mode="json", exclude={"label", "logits"}) | own
        if isinstance(self.logits, TopConfig):
            return content | {"logits": {"top": self.logits.top}}
        return content if self.logits == "float16" else content | {"logits": self.logits}

    @property
    def network(self) -> ModelConfig:
        if self.run is not None:
            return self.run.student
        return ModelConfig(
            name=str(self.name), weights=self.weights, params=self.params, stem=self.stem
        )


class DiagnosticsConfig(Strict):
    """What is measured beside accuracy, every epoch on held-out pictures."""

    bounds: bool = False  # both sides of KD2M's theorem 3.1, as kdcore/metrics/bounds.py says
    rows: PositiveInt = 2048  # of the validation split, at most
    teacher: str | None = None  # the label of the one beside the student, where there are several


def _one_or_several(value: Any) -> str:
    return "(several)" if isinstance(value, list | tuple) else "(one)"


Several = Annotated[tuple[TeacherConfig, ...], Field(min_length=1), Tag("(several)")]
Teachers = Annotated[
    Annotated[TeacherConfig, Tag("(one)")] | Several, Discriminator(_one_or_several)
]

_METRICS = ("loss", "top1")  # of every run's training, beside its terms


def _no_password(caches: str) -> str:
    if "@" in urlsplit(caches).netloc:
        raise ValueError(
            "the address holds a password, which everyone who sees the run would read; give "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what your store has, instead"
        )
    return caches


Caches = Annotated[str, AfterValidator(_no_password)]


def _refuse_custom(losses: Mapping[str, Any]) -> None:
    for label, term in losses.items():
        if isinstance(term, dict) and is_custom(str(term["loss"])):
            raise ValueError(
                f"{label}: {term['loss']!r} is code from elsewhere, and would be run: say "
                f"`{FLAG}: true` in the run if you trust it"
            )


class Listener(NamedTuple):
    """Where a run listens to a teacher: to the only one or the average where it names none."""

    place: str
    teacher: str | None
    needs_one: bool  # rather than the average: ``Loss.needs_one_teacher``


class RunConfig(Strict):
    """One student: complete by itself."""

    name: str = "run"
    student: StudentConfig
    teacher: Teachers | None = None
    ensemble: Ensemble = "probabilities"  # in which several teachers are averaged
    data: DataConfig
    epochs: PositiveInt
    batch_size: PositiveInt = 64  # per run, not per worker
    optimizer: OptimizerConfig = OptimizerConfig()
    allow_custom_losses: bool = False  # a loss may be module:attr, which runs its code
    losses: dict[str, LossConfig]
    synthetic: SyntheticConfig | None = None  # instead of the data's pictures, which only validate
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    workers: PositiveInt = 1
    min_workers: PositiveInt | None = None  # with so few it goes on when others are lost
    save_every: PositiveInt | None = None  # steps: checkpoints within an epoch, not only at its end
    seed: NonNegativeInt = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    runs: Path = Path("runs")  # where finished runs are kept
    caches: Caches = "caches"  # where teacher caches are kept, a path or s3://, gs://; or one cache

    @model_validator(mode="before")
    @classmethod
    def _batch_of_the_method(cls, content: Any) -> Any:
        """Without `batch_size`, synthetic pictures come in the batches of their method."""
        if not isinstance(content, dict) or not content.get("synthetic") or "batch_size" in content:
            return content
        try:
            synthetic = SyntheticConfig.model_validate(content["synthetic"])
        except ValueError:
            return content  # the field's own error says where
        return {**content, "batch_size": synthetic.batch_size}

    @field_validator("losses", mode="before")
    @classmethod
    def _label_names_loss(cls, losses: Any, info: ValidationInfo) -> Any:
        if not isinstance(losses, dict):
            return losses
        for label in losses:
            if not str(label).isidentifier() or label in _METRICS:
                raise ValueError(
                    f"a loss label is a word such as kd or mid_layer and no metric's name "
                    f"({', '.join(_METRICS)}), got {label!r}"
                )
        named = {
            label: {"loss": label, **term} if isinstance(term, dict) else term
            for label, term in losses.items()
        }
        if not info.data.get(FLAG):  # here, before a term is looked at: that imports it
            _refuse_custom(named)
        return named

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if not self.losses:
            raise ValueError("losses: expected at least one, such as `ce: {weight: 1}`")
        if "ce" in self.losses and self.losses["ce"].loss != "ce":
            raise ValueError(
                f"losses.ce is cross-entropy, not {self.losses['ce'].loss!r}; rename it"
            )
        check_shares(self.batch_size, self.workers, self.min_workers)
        if not any(term.is_on for term in self.losses.values()):
            raise ValueError("losses: expected one with a weight above 0, else nothing is trained")
        return self

    @model_validator(mode="after")
    def _teachers_are_told_apart(self) -> RunConfig:
        titles = [teacher.title for teacher in self._listed_teachers]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"teacher: {title!r} is the name of two; give each a `label`")
        for label, teacher in self.teachers.items():
            if teacher.run is not None:
                self._sees_what_its_teacher_saw(label, teacher.run.data)
        return self

    @model_validator(mode="after")
    def _synthetic_pictures_are_the_teacher_s(self) -> RunConfig:
        if self.synthetic is None:
            return self
        self.synthetic.check_batch(self.batch_size, workers=self.workers)
        self.synthetic.check_rounds(self.epochs)
        if self.min_workers is not None:
            raise ValueError(
                "min_workers: each worker remembers the synthetic pictures that it has made, for "
                "as many workers as there were; leave it out, and give the run its workers"
            )
        if self.save_every is not None:
            raise ValueError(
                "save_every: what makes synthetic pictures is written down between epochs and at "
                "times of its own in a warm-up; leave it out, and have shorter epochs by "
                "synthetic.change.schedule"
            )
        if self.data.views:
            raise ValueError(
                f"data.views: {self.data.views} are views of real pictures, and the student sees "
                "synthetic ones in their method's synthetic.change.student_view; leave views out"
            )
        for label, teacher in self.teachers.items():
            if teacher.source != "live":
                raise ValueError(
                    f"the {self.called(label)} is {teacher.source}, and a cache says nothing of "
                    "synthetic pictures, which are new in every batch: give it `source: live`"
                )
            if teacher.precision != "fp32":
                raise ValueError(
                    f"the {self.called(label)} has precision {teacher.precision}: synthetic "
                    "pictures follow its gradients, which need fp32"
                )
        return self

    @model_validator(mode="after")
    def _listeners_name_teachers(self) -> RunConfig:
        named = {f"losses.{label}": term.teacher for label, term in self.losses.items()}
        named["diagnostics"] = self.diagnostics.teacher
        if self.synthetic is not None:
            named["synthetic"] = self.synthetic.teacher
        for form, joined in self.student.joins.items():
            named[f"student.{form}"] = joined.teacher
        for place, name in named.items():
            if self.teachers and name is not None and name not in self.teachers:
                raise ValueError(f"{place}.teacher: {unknown_name('teacher', name, self.teachers)}")
        for listener in self._listeners:
            if not self.teachers:
                raise ValueError(f"{listener.place} needs a teacher and the run has none")
            if listener.needs_one and listener.teacher is None and len(self.teachers) > 1:
                known = ", ".join(self.teachers)
                raise ValueError(
                    f"{listener.place} needs a teacher's layers or classifier, and the average of "
                    f"several has neither: say whose by `teacher`, one of {known}"
                )
        return self

    def _sees_what_its_teacher_saw(self, label: str, theirs: DataConfig) -> None:
        for key, here, there in compared(self.data, theirs):
            if here != there:
                raise ValueError(
                    f"data.{key} is {here!r} and the {self.called(label)}'s run has {there!r}; "
                    f"they must be the same (teacher.run.data.{key})"
                )

    @property
    def active(self) -> Mapping[str, LossConfig]:
        """The terms that are computed: cross-entropy, and whatever has a weight."""
        return {
            label: term
            for label, term in self.losses.items()
            if term.is_on or not loss_line(term.loss).needs_teacher
        }

    @property
    def _listeners(self) -> list[Listener]:
        terms = [
            Listener(f"losses.{label}", term.teacher, loss_line(term.loss).needs_one_teacher)
            for label, term in self.active.items()
            if loss_line(term.loss).needs_teacher
        ]
        joins = [
            Listener(f"student.{form}", joined.teacher, needs_one=True)
            for form, joined in self.student.joins.items()
        ]
        others = []
        if self.diagnostics.bounds:
            others.append(Listener("diagnostics.bounds", self.diagnostics.teacher, needs_one=True))
        if self.synthetic is not None:
            others.append(Listener("synthetic", self.synthetic.teacher, needs_one=True))
        return [*terms, *joins, *others]

    @property
    def is_taught(self) -> bool:
        """Whether it learns from the teacher in any way; a run that does not is a control."""
        if self.synthetic is not None:
            return True
        listens = any(loss_line(term.loss).needs_teacher for term in self.active.values())
        return listens or self.student.reuse is not None

    @property
    def is_control(self) -> bool:
        """The plain student by itself: no term listens, and nothing is added to the network."""
        return not self.is_taught and self.student.is_plain

    @property
    def selects(self) -> tuple[str, Literal["max", "min"]]:
        """The metric by which the best epoch is chosen, and which way is better."""
        by_agreement = self.synthetic is not None and self.synthetic.select == "agreement"
        return (AGREEMENT if by_agreement else "val/top1", "max")

    @property
    def metrics(self) -> Mapping[str, Literal["max", "min"]]:
        """What every epoch measures that a sweep may rank by, and which way is better."""
        name, way = self.selects  # the agreement where it is asked for, and measured
        return {"val/top1": "max", "val/nll": "min", "val/calibration_error": "min", name: way}

    @property
    def teachers(self) -> Mapping[str, TeacherConfig]:
        """The teachers by label, in the order of the file."""
        return {teacher.title: teacher for teacher in self._listed_teachers}

    @property
    def heard(self) -> Mapping[str, TeacherConfig]:
        """The teachers that a term or a diagnostic listens to: no others need to be run."""
        named = {listener.teacher for listener in self._listeners}
        return {label: held for label, held in self.teachers.items() if named & {label, None}}

    @property
    def hears_average(self) -> bool:
        """Whether anyone listens to several teachers at once."""
        return len(self.heard) > 1 and None in {one.teacher for one in self._listeners}

    @property
    def teacher_layers(self) -> Mapping[str, tuple[str, ...]]:
        """Of every teacher that is heard the layers that are read, sorted; always the embedding."""
        return {label: tuple(sorted({EMBEDDING, *self._layers_of(label)})) for label in self.heard}

    def hearing(self, teacher: str) -> Mapping[str, LossConfig]:
        """The terms that listen to a teacher, by its name or among others."""
        return {
            label: term for label, term in self.active.items() if term.teacher in (teacher, None)
        }

    def _layers_of(self, teacher: str) -> Iterator[str]:
        for term in self.hearing(teacher).values():
            yield from term.layers.values()
        for joined in self.student.joins.values():
            if joined.teacher in (teacher, None):
                yield joined.teacher_layer
        if self.synthetic is not None and self.synthetic.teacher in (teacher, None):
            yield from self.synthetic.layers

    def called(self, label: str) -> str:
        """A teacher in words, which needs its label only beside others."""
        return "teacher" if len(self.teachers) == 1 else f"teacher {label}"

    def taught_by(self, label: str) -> RunConfig:
        """The same run with one of its teachers: what the cache of that teacher is made for."""
        return self.model_copy(update={"teacher": self.teachers[label]})

    @property
    def _listed_teachers(self) -> tuple[TeacherConfig, ...]:
        if isinstance(self.teacher, tuple):
            return self.teacher
        return () if self.teacher is None else (self.teacher,)

    @property
    def student_layers(self) -> tuple[str, ...]:
        return tuple(sorted({layer for term in self.active.values() for layer in term.layers}))

    @property
    def identity(self) -> str:
        """Twelve hex digits of every value that decides the numbers, weights files by content."""
        return identity_of(self)

    @property
    def folder(self) -> Path:
        return self.runs / f"{self.name}-{self.identity}"


TeacherConfig.model_rebuild()
