"""What a run is: every value checked, every default filled in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from kdcore.losses import LOSSES
from kdcore.taps import EMBEDDING
from pipelines.networks import ModelConfig
from pipelines.optimizer import OptimizerConfig
from pipelines.strict import Strict
from pipelines.terms import LossConfig


class TeacherConfig(Strict):
    """A network with weights, or (``run``) the best student of another run, trained if need be."""

    name: str | None = None
    weights: Path | None = None
    params: dict[str, Any] = {}
    stem: Literal["original", "small"] = "original"
    run: RunConfig | None = None
    source: Literal["cached", "live"] = "cached"
    precision: Literal["fp32", "bf16"] = "fp32"  # of the teacher's forward pass

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
        _ = self.network
        return self

    @property
    def title(self) -> str:
        """The name of its network or of its run."""
        return str(self.name) if self.run is None else self.run.name

    @property
    def network(self) -> ModelConfig:
        if self.run is not None:
            return self.run.student
        return ModelConfig(
            name=str(self.name), weights=self.weights, params=self.params, stem=self.stem
        )


class AugmentConfig(Strict):
    """What a view does to a picture; the numbers are drawn from (sample, view, seed)."""

    crop: NonNegativeInt = 0  # zero-padding in pixels before a crop of the original size
    flip: bool = False  # horizontal, with probability 1/2


class DataConfig(Strict):
    """Where pictures come from, how they are split, seen and normalised."""

    name: str  # digits | parquet | folder | a torchvision dataset such as CIFAR100
    root: Path | None = None
    download: bool = False
    size: PositiveInt | None = None  # resize to size x size; needed where pictures differ
    limit: PositiveInt | None = None  # the first rows of the training file only
    validation: float = Field(default=0.1, gt=0, lt=1)  # share of the training file
    split_seed: NonNegativeInt = 0
    views: NonNegativeInt = 0  # augmented views; 0 trains on the pictures as they are
    view_seed: NonNegativeInt = 0
    augment: AugmentConfig = AugmentConfig()
    mean: tuple[float, ...] = (0.5,)
    std: tuple[PositiveFloat, ...] = (0.25,)

    @model_validator(mode="after")
    def _augments_views(self) -> DataConfig:
        if self.augment != AugmentConfig() and self.views == 0:
            raise ValueError("augment changes views, and there are none: give data.views")
        return self


class DiagnosticsConfig(Strict):
    """What is measured beside accuracy, every epoch on held-out pictures."""

    bounds: bool = False  # both sides of KD2M's theorem 3.1, as kdcore/metrics/bounds.py says
    rows: PositiveInt = 2048  # of the validation split, at most


_METRICS = ("loss", "top1")  # of every run's training, beside its terms


class RunConfig(Strict):
    """One student: complete by itself."""

    name: str = "run"
    student: ModelConfig
    teacher: TeacherConfig | None = None
    data: DataConfig
    epochs: PositiveInt
    batch_size: PositiveInt = 64  # per run, not per worker
    optimizer: OptimizerConfig = OptimizerConfig()
    losses: dict[str, LossConfig]
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    workers: PositiveInt = 1
    seed: NonNegativeInt = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    runs: Path = Path("runs")  # where finished runs are kept
    caches: Path = Path("caches")  # where teacher caches are kept; or one cache

    @field_validator("losses", mode="before")
    @classmethod
    def _label_names_loss(cls, losses: Any) -> Any:
        if not isinstance(losses, dict):
            return losses
        for label in losses:
            if not str(label).isidentifier() or label in _METRICS:
                raise ValueError(
                    f"a loss label is a word such as kd or mid_layer and no metric's name "
                    f"({', '.join(_METRICS)}), got {label!r}"
                )
        return {
            label: {"loss": label, **term} if isinstance(term, dict) else term
            for label, term in losses.items()
        }

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if not self.losses:
            raise ValueError("losses: expected at least one, such as `ce: {weight: 1}`")
        if "ce" in self.losses and self.losses["ce"].loss != "ce":
            raise ValueError(
                f"losses.ce is cross-entropy, not {self.losses['ce'].loss!r}; rename it"
            )
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of workers {self.workers}: every "
                "worker gets as many rows as every other"
            )
        if not any(term.is_on for term in self.losses.values()):
            raise ValueError("losses: expected one with a weight above 0, else nothing is trained")
        for teacher in self.teachers.values():
            if teacher.run is not None:
                self._sees_what_its_teacher_saw(teacher.run.data)
        for who in self._listeners():
            if not self.teachers:
                raise ValueError(f"{who} needs a teacher and the run has none")
        return self

    def _sees_what_its_teacher_saw(self, theirs: DataConfig) -> None:
        """Else the teacher meets pictures it was not made for, or was trained on our validation."""
        keys = ("name", "root", "size", "limit", "validation", "split_seed", "mean", "std")
        for key in keys:
            if getattr(self.data, key) != getattr(theirs, key):
                raise ValueError(
                    f"data.{key} is {getattr(self.data, key)!r} and the teacher's run has "
                    f"{getattr(theirs, key)!r}; they must be the same (teacher.run.data.{key})"
                )

    @property
    def active(self) -> Mapping[str, LossConfig]:
        """The terms that are computed: cross-entropy, and whatever has a weight."""
        return {
            label: term
            for label, term in self.losses.items()
            if term.is_on or not LOSSES[term.loss].needs_teacher
        }

    def _listeners(self) -> Iterator[str]:
        """Where somebody listens to a teacher."""
        for label, term in self.active.items():
            if LOSSES[term.loss].needs_teacher:
                yield f"losses.{label}"
        if self.diagnostics.bounds:
            yield "diagnostics.bounds"

    @property
    def is_taught(self) -> bool:
        """Whether any term listens to the teacher; a run of which none does is a control."""
        return any(LOSSES[term.loss].needs_teacher for term in self.active.values())

    @property
    def teachers(self) -> Mapping[str, TeacherConfig]:
        """The teachers by label."""
        return {} if self.teacher is None else {self.teacher.title: self.teacher}

    @property
    def heard(self) -> Mapping[str, TeacherConfig]:
        """The teachers that a term or a diagnostic listens to: no others need to be run."""
        return self.teachers if any(True for _ in self._listeners()) else {}

    @property
    def teacher_layers(self) -> Mapping[str, tuple[str, ...]]:
        """Of every teacher that is heard the layers that are read, sorted; always the embedding."""
        layers = {layer for term in self.active.values() for layer in term.layers.values()}
        return dict.fromkeys(self.heard, tuple(sorted(layers | {EMBEDDING})))

    @property
    def student_layers(self) -> tuple[str, ...]:
        return tuple(sorted({layer for term in self.active.values() for layer in term.layers}))

    @property
    def identity(self) -> str:
        """Twelve hex digits of every value that decides the numbers, weights files by content.

        A teacher's term of weight 0 is left out, and a teacher that no term listens to with it: the
        control of every sweep is one run. A dataset counts by its name and root, not its content.
        """
        content = self.model_dump(mode="json", exclude={"name", "runs", "caches"})
        del content["data"]["download"]
        content["student"]["weights"] = _file_digest(self.student.weights)
        content["losses"] = {label: content["losses"][label] for label in self.active}
        if not (self.is_taught or self.diagnostics.bounds):
            content["teacher"] = None
        elif self.teacher is not None:
            content["teacher"]["weights"] = _file_digest(self.teacher.weights)
            content["teacher"]["run"] = self.teacher.run and self.teacher.run.identity
        return digest(content)[:12]

    @property
    def folder(self) -> Path:
        return self.runs / f"{self.name}-{self.identity}"


TeacherConfig.model_rebuild()


def plain(config: Strict) -> dict[str, Any]:
    """The configuration as YAML would hold it, with every default filled in."""
    return config.model_dump(mode="json")


def digest(content: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _file_digest(path: Path | None) -> str | None:
    """Of the content: other weights under the same name make another run."""
    if path is None or not path.is_file():
        return None if path is None else str(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()
