"""What a run trains on, epoch by epoch: the pictures of its data, or synthetic ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from kdcore.datafree.batches import SyntheticBatches
from kdcore.taps import Tapped
from kdcore.teachers import taught_together
from kdcore.types import Batch
from pipelines.build import teacher_precision
from pipelines.config import RunConfig
from pipelines.data import Reader
from pipelines.synthetic import (
    draw_sample,
    synthetic_batches,
    synthetic_metrics,
    taught_by,
)

Live = Mapping[str, Tapped]


class TrainingBatches(ABC):
    """The batches of one worker, on the device, with what all teachers say."""

    @abstractmethod
    def warm_up(self) -> Iterator[None]:
        """Get ready for the first epoch; stops where a checkpoint can be taken."""

    @abstractmethod
    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]:
        """Those of an epoch, which count from 0, from batch ``start`` on."""

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, Any]:
        """What a checkpoint holds of them."""

    @abstractmethod
    def metrics(self, student: Tapped) -> dict[str, float]:
        """Of the epoch that has ended, as its student finds it."""

    @abstractmethod
    def draw(self, epoch: int) -> None:
        """Keep something to look at after so many epochs."""


def training_batches(
    run: RunConfig, student: Tapped, reader: Reader, live: Live, device: torch.device
) -> TrainingBatches:
    """The run's; ``live`` are the teachers whose outputs do not come with the reader's batches."""
    if run.synthetic is None:
        return _OfData(run, reader, live, device)
    teacher = live[taught_by(run)]
    shape = reader.pictures.image.shape[1:]
    others = {label: held for label, held in live.items() if label != taught_by(run)}
    return _Synthetic(run, synthetic_batches(run, student, teacher, shape), others, device)


def with_teachers(
    run: RunConfig, batches: Iterable[Batch], live: Live, device: torch.device
) -> Iterator[Batch]:
    """Batches on the device with what all teachers say, those of the reader's and live ones."""
    moved = (batch.to(device) for batch in batches)
    precision = {label: teacher_precision(run.teachers[label]) for label in live}
    return taught_together(moved, live, precision=precision, space=run.ensemble)


@final
@dataclass(frozen=True)
class _OfData(TrainingBatches):
    run: RunConfig
    reader: Reader
    live: Live
    device: torch.device

    def warm_up(self) -> Iterator[None]:
        return iter(())

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]:
        batches = self.reader.train(number, start=start)
        return with_teachers(self.run, batches, self.live, self.device)

    @property
    def parts(self) -> Mapping[str, Any]:
        return {}

    def metrics(self, student: Tapped) -> dict[str, float]:
        return {}

    def draw(self, epoch: int) -> None:
        pass


@final
@dataclass(frozen=True)
class _Synthetic(TrainingBatches):
    run: RunConfig
    batches: SyntheticBatches
    others: Live  # the teachers beside the one of whom the pictures are made
    device: torch.device

    def warm_up(self) -> Iterator[None]:
        return self.batches.warm_up()

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]:
        # from the first on: RunConfig allows no checkpoint within an epoch
        return with_teachers(self.run, self.batches.epoch(number), self.others, self.device)

    @property
    def parts(self) -> Mapping[str, Any]:
        return {"synthetic": self.batches}

    def metrics(self, student: Tapped) -> dict[str, float]:
        return synthetic_metrics(self.run, self.batches, student)

    def draw(self, epoch: int) -> None:
        draw_sample(self.run, self.batches, epoch)
