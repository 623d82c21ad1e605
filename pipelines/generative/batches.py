"""Rows to batches: those of data, or only numbers whose noise is theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcore.rows import num_workers
from pipelines.datasets import DataConfig
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.models import Model
from pipelines.generative.observations import Observations, Tensors, split
from pipelines.generative.samples import HELD_OUT, TRAINED, Compared, Judge, conditions, noise_of
from pipelines.generative.steps import RowBatch
from pipelines.generative.tables import TableConfig
from pipelines.generative.traces import Traces
from pipelines.views import permutation


@dataclass(frozen=True)
class Batches:
    """The batches of one worker of one run: a pure function of the run and the epoch.

    Every worker's rows are its slice of the same batches. Without data a row is its number.
    """

    run: GenerativeConfig
    seen: Observations | None  # None where nothing is learned from data
    rank: int
    device: torch.device
    traces: Traces | None = None  # of the teacher, where they are kept

    @property
    def per_epoch(self) -> int:
        """How many batches an epoch has."""
        return len(self._training_rows(0)) // self.run.batch_size

    def train(self, epoch: int) -> Iterator[RowBatch]:
        """The batches of an epoch; rows that fill none are left out, others in every epoch."""
        count, size = num_workers(), self.run.batch_size
        rows = self._training_rows(epoch)
        share = size // count
        for first in range(0, len(rows) // size * size, size):
            mine = rows[first + self.rank * share :][:share]
            yield self._batch(mine, TRAINED, epoch, at=epoch + first / len(rows))

    def held_out(self, condition: int | None = None) -> Iterator[RowBatch]:
        """The rows that choose the epoch: of the validation split, or noise of their own.

        With a ``condition`` all of its rows, whatever the run learns from.
        """
        rows, size = self._held_out_rows(condition), self.run.batch_size
        for first in range(0, len(rows), size):
            yield self._batch(rows[first : first + size], HELD_OUT, 0, at=float(self.run.epochs))

    def check(self) -> None:
        """Raise ValueError where the rows fill no batch."""
        if len(self._training_rows(0)) < self.run.batch_size:
            raise ValueError(
                f"batch_size {self.run.batch_size} is more than the "
                f"{len(self._training_rows(0))} training rows"
            )

    def _training_rows(self, epoch: int) -> np.ndarray:
        if self.seen is None:
            count = self.run.batches * self.run.batch_size
            if self.traces is None:
                return np.arange(count)
            return np.resize(self._order(len(self.traces), epoch), count)
        rows = self._split()[0]
        return rows[self._order(len(rows), epoch)]

    def _order(self, count: int, epoch: int) -> np.ndarray:
        order = permutation(count, seed=self.run.seed, epoch=epoch, stream="order")
        return order.numpy()

    def _held_out_rows(self, condition: int | None) -> np.ndarray:
        if self.seen is None:
            return np.arange(self.run.distances.rows)
        if condition is None:
            return self._split()[1]
        held_out = self.seen.rows[split(self.seen, data_of(self.run))[1]]
        return np.intersect1d(held_out, self.seen.of_condition(condition))

    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows that the run learns from, and those of them that are held out."""
        assert self.seen is not None
        is_going_on = self.run.mode == "continual"
        kept = self.seen.of_condition(
            self.run.continual.new if is_going_on else self.run.scratch.condition
        )
        train, held_out = (self.seen.rows[one] for one in split(self.seen, data_of(self.run)))
        return np.intersect1d(train, kept), np.intersect1d(held_out, kept)

    def _batch(self, rows: np.ndarray, use: int, epoch: int, *, at: float) -> RowBatch:
        index = torch.from_numpy(rows).to(self.device)
        noise = noise_of(self.run, index, use=use, epoch=epoch)
        if self.seen is None:
            kept = self.traces if use == TRAINED else None
            taught = kept and kept.take(rows, self.device)
            return RowBatch(noise, {}, conditions(self.run.model, index), at, taught)
        targets, inputs = (_moved(held, self.device) for held in self.seen.take(rows))
        return RowBatch(noise, targets, inputs, at)


def data_of(run: GenerativeConfig) -> DataConfig | TableConfig:
    """The data that a run learns from or is measured against; it must have some."""
    assert run.evidence is not None
    return run.evidence


def judge_of(
    run: GenerativeConfig,
    teacher: Model | None,
    seen: Observations | None,
    device: torch.device,
    *,
    places: np.ndarray | None = None,
) -> Judge:
    """The judge of a run, with the data that it compares on the device.

    These are the held-out rows of a training part, or the rows at some places of what was seen.
    """
    if teacher is not None:
        teacher.to(device).eval()
    data: dict[str, Compared] = {}
    if seen is not None:
        rows = seen.rows[split(seen, data_of(run))[1] if places is None else places]
        for name, condition in _named_conditions(run).items():
            chosen = np.intersect1d(rows, seen.of_condition(condition))[: run.distances.rows]
            data[name] = Compared(_moved(seen.take(chosen)[0], device), condition)
    return Judge(run, teacher, data, device)


def _named_conditions(run: GenerativeConfig) -> dict[str, int | None]:
    if run.mode == "continual":
        return {"old_data": run.continual.old, "new_data": run.continual.new}
    return {"data": run.scratch.condition}


def _moved(tensors: Tensors, device: torch.device) -> dict[str, Tensor]:
    return {name: held.to(device) for name, held in tensors.items()}
