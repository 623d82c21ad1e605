"""The training loop of graphical models in plain torch: no Ray, no MLflow."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kdcore.rows import num_workers
from pipelines.config import DataConfig
from pipelines.generative.config import GenerativeConfig, TableConfig
from pipelines.generative.models import PREFIX, Model
from pipelines.generative.observations import Observations, Tensors, split
from pipelines.generative.samples import HELD_OUT, TRAINED, Compared, Judge, conditions, noise_of
from pipelines.generative.steps import GenerativeStep, GoesOnStep, RowBatch
from pipelines.loop import (
    Metrics,
    Progress,
    Report,
    Sums,
    check_finite,
    copied,
    optimizer_of,
    resumed,
    save,
    schedule_of,
    state_of,
)
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

    @property
    def per_epoch(self) -> int:
        """How many batches an epoch has."""
        return len(self._training_rows(0)) // self.run.batch_size

    def train(self, epoch: int) -> Iterator[RowBatch]:
        """The batches of an epoch; rows that fill none are left out, others in every epoch."""
        count, size = self.run.workers, self.run.batch_size
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
            return np.arange(self.run.batches * self.run.batch_size)
        rows = self._split()[0]
        order = permutation(len(rows), seed=self.run.seed, epoch=epoch, stream="order")
        return rows[order.numpy()]

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
            return RowBatch(noise, {}, conditions(self.run.model, index), at)
        targets, inputs = (_moved(held, self.device) for held in self.seen.take(rows))
        return RowBatch(noise, targets, inputs, at)


def data_of(run: GenerativeConfig) -> DataConfig | TableConfig:
    """The data that a run learns from or is measured against; it must have some."""
    assert run.evidence is not None
    return run.evidence


def fit(
    run: GenerativeConfig,
    step: GenerativeStep,
    batches: Batches,
    judge: Judge,
    *,
    report: Report,
    resume: Path | None = None,
    device: torch.device,
) -> Progress:
    """Train the step and report every epoch; with a process group, one of its workers.

    The first worker measures and keeps. ``resume`` is the folder of a checkpoint; the result is
    that of an undisturbed run, and what was reported before is reported again.

    Raises FloatingPointError, before the weights are touched, where the loss is not finite.
    """
    step.to(device)
    module: nn.Module = step
    if num_workers() > 1:
        # BatchNorm spans the workers, so that their buffers are equal
        module = DistributedDataParallel(step, broadcast_buffers=False)
    optimizer = optimizer_of([{"params": list(_trained(step))}], run.optimizer)
    schedule = schedule_of(optimizer, run.optimizer, run.epochs)
    parts = {"trained": step.trained, "optimizer": optimizer, "schedule": schedule}
    progress, best = resumed(resume, parts, device)
    for past in progress.history:
        report(past, None)

    for epoch in range(len(progress.history), run.epochs):
        started = time.perf_counter()
        learning_rate = schedule.get_last_lr()[0]
        metrics = _train_epoch(module.train(), batches.train(epoch), optimizer).means()
        schedule.step()
        metrics |= {"lr": learning_rate, "epoch": epoch + 1}
        if batches.rank > 0:
            progress.history.append(metrics)
            report(metrics, None)
            continue
        step.eval()
        metrics |= _held_out(run, step, batches) | judge.of_epoch(step.generator)
        if progress.add(metrics, run.selects):
            best = copied(step.kept())
        if epoch + 1 == run.epochs:
            _measure_chosen(progress, judge, step, best)
        metrics["seconds"] = time.perf_counter() - started
        with tempfile.TemporaryDirectory(prefix="kdsweep-") as folder:
            save(Path(folder), state_of(parts, progress), step.kept(), best)
            report(metrics, Path(folder))
    return progress


def _trained(step: GenerativeStep) -> Iterator[nn.Parameter]:
    return (held for held in step.parameters() if held.requires_grad)


def _train_epoch(module: nn.Module, batches: Iterator[RowBatch], optimizer: Optimizer) -> Sums:
    seen = Sums()
    for batch in batches:
        learned = module(batch)
        check_finite(learned.loss, learned.parts)
        optimizer.zero_grad(set_to_none=True)
        learned.loss.backward()
        optimizer.step()
        seen.add({"loss": learned.loss.detach(), **learned.parts})
    return seen


def _held_out(run: GenerativeConfig, step: GenerativeStep, batches: Batches) -> Metrics:
    """What chooses the epoch, over the held-out rows; of a model that goes on both its bounds."""
    found = {run.selects[0]: _mean(step.judged, batches.held_out())}
    if isinstance(step, GoesOnStep):
        for name in ("old", "new"):
            rows = batches.held_out(getattr(run.continual, name))
            found[f"val/elbo_{name}"] = _mean(step.bound, rows)
    return found


def _mean(measured: Callable[[RowBatch], Tensor], batches: Iterator[RowBatch]) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            total += batch.num_rows * float(measured(batch))
            count += batch.num_rows
    return total / count


def _measure_chosen(
    progress: Progress, judge: Judge, step: GenerativeStep, best: dict[str, Tensor]
) -> None:
    """Add what the delivered weights' samples measure to the last epoch and to the best one."""
    generator = copy.deepcopy(step.generator).eval()
    own = {
        name.removeprefix(PREFIX): held
        for name, held in best.items()
        if name[: len(PREFIX)] == PREFIX
    }
    generator.load_state_dict(own)
    found = judge.of_run(generator)
    progress.history[-1] |= found
    if progress.best is not None:
        progress.best |= found


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
