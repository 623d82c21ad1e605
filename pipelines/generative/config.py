"""What a run of a graphical model is: every value checked, every default filled in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    NonNegativeInt,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from pipelines.config import Caches
from pipelines.datasets import DataConfig
from pipelines.digests import digest, file_digest
from pipelines.generative.modes import (
    DISTILLED,
    ContinualConfig,
    DistancesConfig,
    DistilConfig,
    Mode,
    ScratchConfig,
)
from pipelines.generative.networks import LadderConfig, NetworkConfig
from pipelines.generative.tables import TableConfig
from pipelines.optimizer import OptimizerConfig, StepsConfig
from pipelines.strict import Strict
from pipelines.workers import check_shares

# of samples, from the teacher's where there is one and else from data
DISTANCES = ("val/frechet", "val/emd", "val/mmd", "val/one_nn")
# of the code of Chen et al. 2023, which changes no learning rate
_ADAM = OptimizerConfig(name="adam", lr=1e-4, weight_decay=1e-4, schedule=StepsConfig(name="steps"))


def _table_or_pictures(value: Any) -> str:
    is_table = "table" in value if isinstance(value, dict) else isinstance(value, TableConfig)
    return "(table)" if is_table else "(pictures)"


Data = Annotated[
    Annotated[TableConfig, Tag("(table)")] | Annotated[DataConfig, Tag("(pictures)")],
    Discriminator(_table_or_pictures),
]


class GenerativeTeacher(Strict):
    """A model with weights, or (``run``) what another run trained."""

    run: GenerativeConfig | None = None
    model: NetworkConfig | None = None
    weights: Path | None = None
    source: Literal["live", "cached"] = "live"  # cached: of the same noise in every epoch
    rows: PositiveInt = 16_384  # of a cache

    @model_validator(mode="after")
    def _one_origin(self) -> GenerativeTeacher:
        given = (self.model is not None, self.weights is not None)
        if given not in ((False, False), (True, True)) or all(given) == (self.run is not None):
            raise ValueError(
                "a teacher is either `model: {...}` with `weights: FILE`, or `run: RUN.yaml`, "
                "whose model it is"
            )
        return self

    @property
    def network(self) -> NetworkConfig:
        """The model that it is."""
        held = self.model if self.run is None else self.run.model
        assert held is not None
        return held


class GenerativeConfig(Strict):
    """One graphical model: complete by itself. ``model`` where other runs have ``student``."""

    name: str = "run"
    model: NetworkConfig
    teacher: GenerativeTeacher | None = None
    data: Data | None = None  # distillation needs none; its teacher's is what it is compared with
    mode: Mode = "scratch"
    distil: DistilConfig = DistilConfig()
    scratch: ScratchConfig = ScratchConfig()
    continual: ContinualConfig = ContinualConfig()
    distances: DistancesConfig = DistancesConfig()
    epochs: PositiveInt
    batch_size: PositiveInt = 64  # per run, not per worker
    batches: PositiveInt = 100  # of an epoch without data
    optimizer: OptimizerConfig = _ADAM
    workers: PositiveInt = 1
    min_workers: PositiveInt | None = None  # with so few it goes on when others are lost
    seed: NonNegativeInt = 0
    runs: Path = Path("runs")  # where finished runs are kept
    caches: Caches = "caches"  # where teachers' runs are, a path or s3://, gs://; or one cache

    @field_validator("optimizer", mode="before")
    @classmethod
    def _adam_unless_named(cls, value: Any) -> Any:
        is_named = not isinstance(value, dict) or "name" in value
        return value if is_named else {**_ADAM.model_dump(), **value}

    @model_validator(mode="before")
    @classmethod
    def _distils_its_teacher(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("teacher") is not None:
            return {"mode": "surrogate", **value}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> GenerativeConfig:
        if self.mode != "scratch" and self.teacher is None:
            raise ValueError(f"mode {self.mode} needs a teacher and the run has none")
        if self.learns_from_data and self.evidence is None:
            raise ValueError(f"mode {self.mode} learns from data: give `data`, or a teacher's run")
        check_shares(self.batch_size, self.workers, self.min_workers)
        if self.hears_cache and (
            self.mode in ("marginalized", "continual") or self.distil.noise > 1
        ):
            raise ValueError(
                "teacher.source: a cache is of runs with one sample of noise, for the modes "
                "surrogate and local; make it `live`"
            )
        if self.distances.features == "teacher" and (
            self.teacher is None or getattr(self.teacher.network, "conditions", ())
        ):
            raise ValueError("distances.features: teacher needs one, and one without conditions")
        if self.distances.network is not None and not isinstance(self.model, LadderConfig):
            raise ValueError(
                f"distances.network: sees pictures, and the model is {self.model.name}"
            )
        if isinstance(self.data, DataConfig) and self.data.views:
            raise ValueError(
                "data.views: a model of pictures learns them as they are; leave it out"
            )
        if self.optimizer.multipliers:
            raise ValueError("optimizer.multipliers: are of a student's layers; leave it out")
        return self

    @model_validator(mode="after")
    def _conditions_exist(self) -> GenerativeConfig:
        known = len(self.model.conditions) if isinstance(self.model, LadderConfig) else 0
        asked = {"scratch.condition": self.scratch.condition}
        if self.mode == "continual":
            if self.teacher is not None and self.teacher.network != self.model:
                raise ValueError("mode continual: the model must be the teacher's, which goes on")
            asked |= {"continual.old": self.continual.old, "continual.new": self.continual.new}
        for place, condition in asked.items():
            if condition is not None and condition >= known:
                raise ValueError(f"{place} is {condition}, and the model has {known} conditions")
        return self

    @property
    def learns_from_data(self) -> bool:
        """Whether the numbers of its training come from data."""
        return self.mode in ("scratch", "continual")

    @property
    def hears_cache(self) -> bool:
        """Whether its teacher's runs are read from a cache."""
        if self.teacher is None or self.mode == "scratch":
            return False
        return self.teacher.source == "cached"

    @property
    def selects(self) -> tuple[str, Literal["max", "min"]]:
        """The metric by which the best epoch is chosen, and which way is better."""
        return ("val/elbo", "max") if self.mode == "scratch" else ("val/objective", "min")

    @property
    def old_condition(self) -> int | None:
        """The condition that the teacher, or a model that learns one only, knows; None for all."""
        return self.continual.old if self.mode == "continual" else self.scratch.condition

    @property
    def is_control(self) -> bool:
        """Whether a sweep's other rows are compared with it: it hears no teacher."""
        return self.mode == "scratch"

    @property
    def evidence(self) -> TableConfig | DataConfig | None:
        """The data that it learns from or is measured against: its own, else its teacher's."""
        if self.data is not None or self.teacher is None or self.teacher.run is None:
            return self.data
        return self.teacher.run.evidence

    @property
    def compares_data(self) -> bool:
        """Whether data are read, be it to learn from or only to be compared with."""
        return self.evidence is not None and (self.learns_from_data or self.distances.data)

    @property
    def metrics(self) -> Mapping[str, Literal["max", "min"]]:
        """What every epoch measures that a sweep may rank by, and which way is better."""
        chosen, mode = self.selects
        return {chosen: mode} | dict.fromkeys(DISTANCES, "min")

    @property
    def identity(self) -> str:
        """Twelve hex digits of every value that decides the numbers, weights files by content."""
        content = self.model_dump(mode="json", exclude={"name", "runs", "caches"})
        for section in {"distil", "scratch", "continual"} - self._heard_sections:
            del content[section]
        if self.learns_from_data:
            content["data"] = self.evidence and self.evidence.model_dump(mode="json")
            del content["batches"]
        if self.min_workers is None:  # so were runs before there was a choice
            del content["min_workers"]
        if self.distances.network is not None:
            content["distances"]["network"]["weights"] = file_digest(self.distances.network.weights)
        if self.teacher is not None:
            held = self.teacher
            own = {"model": held.model and held.model.model_dump(mode="json")}
            own |= {"weights": file_digest(held.weights), "run": held.run and held.run.identity}
            if self.hears_cache:
                own |= {"source": held.source, "rows": held.rows}
            content["teacher"] = own
        return digest(content)[:12]

    @property
    def _heard_sections(self) -> set[str]:
        if self.mode in DISTILLED:
            return {"distil"}
        return {"scratch"} if self.mode == "scratch" else {"continual", "distil"}

    @property
    def folder(self) -> Path:
        return self.runs / f"{self.name}-{self.identity}"


GenerativeTeacher.model_rebuild()
