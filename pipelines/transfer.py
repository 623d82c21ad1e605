"""What a transfer set is: a teacher, a data-free method and its changes, a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from kdcore.checks import unknown_name
from kdcore.datafree.plans import Method, Offline, Weighted
from kdcore.datafree.presets import PRESETS
from kdcore.datafree.priors import check_priors
from kdcore.datafree.targets import RecordedActivations
from pipelines.config import DataConfig, TeacherConfig, digest
from pipelines.strict import Strict, problems

# In the folder of a set: what it is of, and that every file is there.
MANIFEST, DONE = "manifest.json", "_SUCCESS"


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
            offline = [key for key, one in PRESETS.items() if isinstance(one.schedule, Offline)]
            raise ValueError(
                f"{name!r} makes pictures while its student learns, so it has no transfer set; "
                f"methods that have: {', '.join(offline)}"
            )
        return name

    @model_validator(mode="after")
    def _consistent(self) -> TransferConfig:
        check_priors(self.plan.priors)
        needs_records = isinstance(self.plan.targets, RecordedActivations)
        if needs_records != (self.records is not None):
            verb = "needs" if needs_records else "has no use for"
            raise ValueError(f"method {self.method!r} {verb} `records`, pictures of real data")
        run = self.teacher.run
        if run is not None and (run.data.mean, run.data.std) != (self.mean, self.std):
            raise ValueError(
                f"mean and std are {self.mean} and {self.std}, and the teacher's run has "
                f"{run.data.mean} and {run.data.std}; they must be the same"
            )
        return self

    @property
    def plan(self) -> Method:
        """The method with its changes."""
        method: Method = changed_plan(PRESETS[self.method], self.change, ("change",))
        return method

    @property
    def identity_content(self) -> dict[str, Any]:
        """Every value that decides a byte of the pictures."""
        keys = {"shape", "num_classes", "mean", "std", "records", "count", "shard_size", "seed"}
        teacher = self.teacher.identity_content
        return {
            **self.model_dump(mode="json", include=keys),
            "method": self.method,
            "plan": TypeAdapter(Method).dump_python(self.plan, mode="json"),
            # not whether it is cached, and in float32 whatever its runs do
            "teacher": {key: teacher[key] for key in teacher.keys() - {"source", "precision"}},
        }

    @property
    def identity(self) -> str:
        return digest(self.identity_content)[:12]

    @property
    def folder(self) -> Path:
        return self.transfer_sets / f"{self.name}-{self.identity}"


def changed_plan(held: Any, changes: Any, above: tuple[str, ...]) -> Any:
    """The plan with other values, which are of the types that it declares.

    A prior that the method does not name may be added. Raises ValueError with the path of a value
    that is unknown or of the wrong kind.
    """
    if is_dataclass(held) and not isinstance(held, type):
        return _changed_fields(held, _mapping(changes, above), above)
    assert isinstance(held, Mapping)
    result = dict(held)
    for key, value in _mapping(changes, above).items():
        if above[-1] == "priors":
            result[key] = changed_plan(held.get(key, Weighted()), value, (*above, key))
        elif key in held and is_dataclass(held[key]):
            result[key] = changed_plan(held[key], value, (*above, key))
        else:
            result[key] = value
    return result


def _changed_fields(held: Any, changes: Mapping[str, Any], above: tuple[str, ...]) -> Any:
    hints = get_type_hints(type(held))
    known = [field.name for field in fields(held)]
    values = {}
    for key, value in changes.items():
        path = (*above, key)
        if key not in known:
            raise ValueError(unknown_name(f"key {'.'.join(above)}", key, known))
        current = getattr(held, key)
        if is_dataclass(current) or isinstance(current, Mapping):
            values[key] = changed_plan(current, value, path)
        else:
            values[key] = _checked(hints[key], value, path)
    return replace(held, **values)


def _mapping(changes: Any, above: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(changes, Mapping):
        raise ValueError(f"{'.'.join(above)}: expected a mapping of keys, got {changes!r}")
    return changes


def _checked(kind: Any, value: Any, path: tuple[str, ...]) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError("; ".join(problems(error, path))) from None
