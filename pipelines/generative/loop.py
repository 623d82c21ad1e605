"""The training loop of graphical models in plain torch: no Ray, no MLflow."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kdcore.rows import num_workers
from pipelines.generative.batches import Batches
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.models import PREFIX
from pipelines.generative.samples import Judge
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
    parts["sums"] = Sums()  # none are open: checkpoints are of whole epochs
    progress, best = resumed(resume, parts, device)
    for past in progress.history:
        report(past, None)

    for epoch in range(len(progress.history), run.epochs):
        started = time.perf_counter()
        learning_rate = schedule.get_last_lr()[0]
        metrics = _train_epoch(module.train(), batches.train(epoch), optimizer).means()
        schedule.step()
        metrics |= {"lr": learning_rate, "epoch": epoch + 1, "system/workers": num_workers()}
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
        progress.best = progress.best | found  # not in the history of its epoch
