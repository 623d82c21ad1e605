"""The training loop in plain torch: no Ray, no MLflow."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kdcore.metrics.classification import BINS, rates, tally
from kdcore.rows import num_workers
from kdcore.schedules import Cosine
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.types import Batch
from pipelines.config import RunConfig
from pipelines.data import Reader
from pipelines.diagnostics import bounds, matched
from pipelines.models import read_state, read_weights, save_weights
from pipelines.optimizer import CosineConfig, OptimizerConfig
from pipelines.students import layer_of
from pipelines.training import TrainingBatches, training_batches, with_teachers
from pipelines.usage import Meter

Metrics = dict[str, float]
# What an epoch gave (None within one or its warm-up), and the folder of a checkpoint, which the
# receiver may empty (None on every worker but the first, and for an epoch that is told again).
Report = Callable[[Metrics | None, Path | None], None]

STATE, BEST, LAST = "state.pt", "best.safetensors", "last.safetensors"


@dataclass
class Progress:
    """What a run must remember to go on from the end of an epoch as if nothing had happened."""

    history: list[Metrics] = field(default_factory=list)
    best: Metrics | None = None

    def add(self, metrics: Metrics, selects: tuple[str, str]) -> bool:
        """Record an epoch; true if it is the best so far by what selects it, and which way."""
        self.history.append(metrics)
        name, mode = selects
        sign = 1 if mode == "max" else -1
        better = self.best is None or sign * metrics[name] > sign * self.best[name]
        if better:
            self.best = metrics
        return better


@dataclass
class Sums:
    """What the steps of an epoch have measured so far, on this worker."""

    steps: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, seen: Mapping[str, Tensor]) -> None:
        self.steps += 1
        self.sums = {
            name: self.sums.get(name, 0.0) + value.double() for name, value in seen.items()
        }

    def clear(self) -> None:
        self.steps, self.sums = 0, {}

    def means(self) -> Metrics:
        """Over the steps of all workers."""
        totals = torch.stack(list(self.sums.values())) / self.steps
        if dist.is_initialized():
            dist.all_reduce(totals)
            totals /= dist.get_world_size()
        return {
            f"train/{name}": value for name, value in zip(self.sums, totals.tolist(), strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums of every worker; all of them must ask at once."""
        if not self.sums:
            return {"steps": 0, "names": [], "sums": []}
        own = torch.stack(list(self.sums.values()))
        held = [own]
        if dist.is_initialized():
            held = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(held, own)
        return {"steps": self.steps, "names": list(self.sums), "sums": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.clear()
        if not state["steps"]:
            return
        held, rank = state["sums"], dist.get_rank() if dist.is_initialized() else 0
        # as many as they were: each its own; else what they had is everyone's, on the mean
        own = held[rank] if len(held) == num_workers() else torch.stack(held).mean(dim=0)
        self.steps, self.sums = state["steps"], dict(zip(state["names"], own, strict=True))


def fit(
    run: RunConfig,
    step: DistillStep,
    reader: Reader,
    *,
    report: Report,
    resume: Path | None = None,
    live: Mapping[str, Tapped] = MappingProxyType({}),
    device: torch.device,
) -> Progress:
    """Train the step's student and report every epoch; with a process group, one of its workers.

    ``live`` are the teachers whose outputs do not come with the reader's batches, from a cache.
    ``resume`` is the folder of a checkpoint: of an epoch, of a part of one (``run.save_every``), or
    of a warm-up of what makes its batches.
    The result is that of an undisturbed run, and what was reported before is reported again.

    Raises FloatingPointError, before the weights are touched, where the loss is not finite.
    """
    if run.precision == "fp16" and device.type != "cuda":
        raise ValueError("precision fp16 needs a GPU; bf16 and fp32 run anywhere")
    module = _over_workers(step.to(device), reader.workers)
    optimizer = optimizer_of(_groups(step, run.optimizer), run.optimizer)
    schedule = schedule_of(optimizer, run.optimizer, run.epochs)
    scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
    so_far = Sums()
    parts: dict[str, Any] = {"step": step, "optimizer": optimizer}
    parts |= {"schedule": schedule, "scaler": scaler, "sums": so_far}
    source = training_batches(run, step.student, reader, live, device)
    parts |= source.parts
    progress, best = resumed(resume, parts, device)
    for past in progress.history:
        report(past, None)

    def checkpoint(metrics: Metrics | None) -> None:
        state = state_of(parts, progress)
        if reader.rank > 0:
            report(metrics, None)
            return
        with tempfile.TemporaryDirectory(prefix="kdsweep-") as folder:
            save(Path(folder), state, step.student.net.state_dict(), best)
            report(metrics, Path(folder))

    for epoch in range(len(progress.history), run.epochs):
        started, meter = time.perf_counter(), Meter(device)
        for _ in source.warm_up():
            checkpoint(None)
        learning_rate = schedule.get_last_lr()[0]
        batches = source.epoch(epoch, start=so_far.steps)
        for seen in _steps(module.train(), batches, optimizer, scaler, run.precision):
            so_far.add(seen)
            is_last = so_far.steps == reader.batches_per_epoch
            if run.save_every and so_far.steps % run.save_every == 0 and not is_last:
                checkpoint(None)
        metrics = so_far.means()
        so_far.clear()
        schedule.step()
        metrics |= _measured(run, step.student, reader, source, live, device)
        metrics |= _summed(meter.read(), device) | {"system/workers": float(num_workers())}
        metrics |= {"lr": learning_rate, "seconds": time.perf_counter() - started}
        metrics["epoch"] = epoch + 1
        if progress.add(metrics, run.selects):
            best = copied(step.student.net.state_dict())
        if reader.rank == 0:
            source.draw(epoch + 1)
        checkpoint(metrics)
    return progress


def _over_workers(step: DistillStep, workers: int) -> nn.Module:
    """The step as the workers train it together."""
    if workers == 1:
        return step
    # buffers are shared once an epoch: in training no number depends on them
    return DistributedDataParallel(step, broadcast_buffers=False)


def _measured(
    run: RunConfig,
    student: Tapped,
    reader: Reader,
    source: TrainingBatches,
    live: Mapping[str, Tapped],
    device: torch.device,
) -> Metrics:
    """What an epoch has made of the student; all workers must ask at once."""
    _share_buffers(student)
    metrics = source.metrics(student)
    metrics |= evaluate(student, reader.validation(), device=device)
    if run.diagnostics.bounds and reader.rank == 0:
        rows = reader.held_out(run.diagnostics.rows)
        beside = with_teachers(run, rows, live, device)
        metrics |= bounds(matched(student, beside, teacher=run.diagnostics.teacher))
    return metrics


def evaluate(
    student: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    prefix: str = "val",
) -> Metrics:
    """Accuracy, negative log-likelihood and calibration error, over the rows of all workers.

    The student is left in the mode in which it came.
    """
    training = student.training
    student.eval()
    sums = torch.zeros(4, BINS, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for batch in batches:
            sums += tally(student(batch.image.to(device)).logits, batch.label.to(device))
    student.train(training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return {f"{prefix}/{name}": value for name, value in rates(sums).items()}


def keep(folder: Path, target: Path) -> None:
    """Move a checkpoint's files into place, each at once: a reader sees the old or the new one."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        arriving = target / f".{file.name}.{os.getpid()}"
        shutil.move(file, arriving)
        arriving.replace(target / file.name)


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _share_buffers(student: nn.Module) -> None:
    """Rank 0's BatchNorm statistics for all: what is evaluated is the network that is saved."""
    if dist.is_initialized():
        for buffer in student.buffers():
            dist.broadcast(buffer, 0)


def _steps(
    module: nn.Module,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    precision: str,
) -> Iterator[Mapping[str, Tensor]]:
    """Learn from each batch, and say what was measured of it."""
    for batch in batches:
        with _autocast(batch.image.device, precision):
            result = module(batch)
        check_finite(result.loss, result.parts)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(result.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        right = batch.right(result.logits.argmax(dim=1)).mean()
        yield {"loss": result.loss.detach(), "top1": right, **result.parts}


def _summed(used: Mapping[str, float], device: torch.device) -> Metrics:
    """What all workers together take of the machine."""
    sums = torch.tensor(list(used.values()), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(used, sums.tolist(), strict=True))


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def check_finite(loss: Tensor, parts: Mapping[str, Tensor]) -> None:
    """Raise FloatingPointError, with the parts, where the loss is not a finite number."""
    if not bool(torch.isfinite(loss)):
        values = ", ".join(f"{label} = {part.item():.4g}" for label, part in parts.items())
        raise FloatingPointError(
            f"the loss is {loss.item()} ({values}); lower optimizer.lr or that term's weight"
        )


def optimizer_of(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    """The optimiser that a run names, over groups of parameters."""
    if config.name == "adam":  # whose weight decay is a term of the loss
        return torch.optim.Adam(groups, lr=config.lr, weight_decay=config.weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def _groups(step: DistillStep, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Everything at the run's learning rate, and then each layer that has a multiple of it.

    Of a layer within another the inner one's counts. ValueError for a layer that holds nothing.
    """
    owned: dict[nn.Parameter, str] = {}
    for name in sorted(config.multipliers, key=lambda name: name.count(".")):
        owned |= dict.fromkeys(layer_of(step.student.net, name).parameters(), name)
    empty = set(config.multipliers) - set(owned.values())
    if empty:
        raise ValueError(f"optimizer.multipliers: {min(empty)!r} has no parameters of its own")
    rest = [held for held in step.parameters() if held not in owned]
    groups: list[dict[str, Any]] = [{"params": rest}]
    for name, multiplier in config.multipliers.items():
        own = [held for held, owner in owned.items() if owner == name]
        groups.append({"params": own, "lr": multiplier * config.lr})
    return groups


def schedule_of(
    optimizer: Optimizer, config: OptimizerConfig, epochs: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate that a run names, over its epochs."""
    if isinstance(config.schedule, CosineConfig):
        half_cosine = Cosine(1.0, config.schedule.floor, float(epochs))
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: half_cosine(float(epoch)))
    return torch.optim.lr_scheduler.MultiStepLR(
        optimizer, milestones=list(config.schedule.epochs), gamma=config.schedule.gamma
    )


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are now, on the CPU."""
    return {name: held.cpu().clone() for name, held in weights.items()}


def state_of(parts: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """All that ``resumed`` needs to go on; every worker must ask at once."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"history": progress.history, "best": progress.best, "random": torch.get_rng_state()}
    # of the own one: how many others a worker sees depends on the node
    state["random_gpu"] = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return state


def save(
    folder: Path, state: Mapping[str, Any], last: Mapping[str, Tensor], best: Mapping[str, Tensor]
) -> None:
    """Write a checkpoint: both weights beside the state."""
    torch.save(state, folder / STATE)
    save_weights(last, folder / LAST)
    if best:  # not yet in the first epoch
        save_weights(best, folder / BEST)


def resumed(
    folder: Path | None, parts: Mapping[str, Any], device: torch.device
) -> tuple[Progress, dict[str, Tensor]]:
    """The progress and the best weights of a checkpoint, and its state put into the parts."""
    if folder is None:
        return Progress(), {}
    state = read_state(folder / STATE, device)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"].cpu())
    if state["random_gpu"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_gpu"][0].cpu())
    progress = Progress(state["history"], state["best"])
    return progress, read_weights(folder / BEST) if progress.best else {}
