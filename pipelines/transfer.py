"""What a transfer set is: a teacher, a data-free method and its changes, a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    field_validator,
    model_validator,
)

from kdcore.checks import unknown_name
from kdcore.datafree.plans import Method, Offline
from kdcore.datafree.presets import PRESETS
from kdcore.datafree.priors import check_priors
from kdcore.datafree.targets import RecordedActivations
from pipelines.config import TeacherConfig
from pipelines.datasets import DataConfig
from pipelines.digests import digest
from pipelines.identity import data_identity
from pipelines.methods import changed_method, offline_names
from pipelines.strict import Strict

CHANNELS = (1, 3)  # that a PNG holds
_NO_STUDENT = "a transfer set is made before any student; leave it out"
# of a method what decides no byte of its pictures, and what to do instead
_OF_THE_STUDENT = {
    "losses": "what a student learns by are the `losses` of its run; give it there",
    "student_view": "how a student sees the pictures is `data.augment` of its run; give it there",
    "student_mode": _NO_STUDENT,
    "pool_limit": _NO_STUDENT,
}


class TransferConfig(Strict):
    """Pictures that a teacher's weights imply, with its answers: data for a run without data."""

    name: str = "transfer"
    teacher: TeacherConfig
    method: str
    change: dict[str, Any] = {}  # of the method's published values, such as schedule: {steps: 200}
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]  # channels, height, width
    num_classes: PositiveInt
    mean: tuple[float, ...] = (0.5,)
    std: tuple[PositiveFloat, ...] = (0.25,)
    records: DataConfig | None = None  # the real pictures of which `lopes` keeps records
    count: PositiveInt
    shard_size: PositiveInt = 1024  # pictures in a file; part of what decides them
    seed: NonNegativeInt = 0
    actors: PositiveInt | None = None  # default: what the cores allow
    samples_every: PositiveInt = 4  # shards of which one is drawn
    transfer_sets: Path = Path("transfer_sets")  # where they are kept

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PRESETS:
            raise ValueError(unknown_name("method", name, PRESETS))
        if not isinstance(PRESETS[name].schedule, Offline):
            raise ValueError(
                f"{name!r} makes pictures while its student learns, so it has no transfer set: "
                f"name it as `synthetic` in a run; methods that have one: {offline_names()}"
            )
        return name

    @model_validator(mode="after")
    def _pictures_can_be_stored(self) -> TransferConfig:
        channels = self.shape[0]
        if channels not in CHANNELS:
            raise ValueError(
                f"shape: expected 1 or 3 channels before height and width, got {self.shape}"
            )
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ValueError(
                    f"{key}: expected one number or as many as channels, {channels}, got {values}"
                )
        return self

    @model_validator(mode="after")
    def _pictures_are_the_teacher_s(self) -> TransferConfig:
        if self.teacher.run is None:
            return self
        theirs = self.teacher.run.data
        if (theirs.mean, theirs.std) != (self.mean, self.std):
            raise ValueError(
                f"mean and std are {self.mean} and {self.std}, and the teacher's run has "
                f"{theirs.mean} and {theirs.std}; they must be the same"
            )
        if theirs.size is not None and self.shape[1:] != (theirs.size, theirs.size):
            raise ValueError(
                f"shape is {self.shape}, and the teacher's run has data.size {theirs.size}; "
                f"expected {(self.shape[0], theirs.size, theirs.size)}"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> TransferConfig:
        for key, remedy in _OF_THE_STUDENT.items():
            if key in self.change:
                raise ValueError(f"change.{key}: {remedy}")
        check_priors(self.plan.priors)
        needs_records = isinstance(self.plan.targets, RecordedActivations)
        if needs_records != (self.records is not None):
            verb = "needs" if needs_records else "has no use for"
            raise ValueError(f"method {self.method!r} {verb} `records`, pictures of real data")
        return self

    @property
    def plan(self) -> Method:
        """The method with its changes."""
        return changed_method(self.method, self.change)

    @property
    def identity_content(self) -> dict[str, Any]:
        """Every value that decides a byte of the pictures."""
        keys = {"shape", "num_classes", "mean", "std", "count", "shard_size", "seed"}
        plan = TypeAdapter(Method).dump_python(self.plan, mode="json")
        teacher = self.teacher.identity_content
        return {
            **self.model_dump(mode="json", include=keys),
            "method": self.method,
            "records": None if self.records is None else data_identity(self.records),
            "plan": {key: plan[key] for key in plan.keys() - _OF_THE_STUDENT.keys()},
            # not whether it is cached, and in float32 whatever its runs do
            "teacher": {key: teacher[key] for key in teacher.keys() - {"source", "precision"}},
        }

    @property
    def identity(self) -> str:
        return digest(self.identity_content)[:12]

    @property
    def folder(self) -> Path:
        return self.transfer_sets / f"{self.name}-{self.identity}"
