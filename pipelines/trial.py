"""One trial, in an actor of Tune: apart from the driver, for whose imports it need not wait."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipelines.cluster import work_in
from pipelines.config import RunConfig
from pipelines.loop import Metrics
from pipelines.sharing import inputs_key
from pipelines.space import SweepConfig
from pipelines.train import train_here, train_with_callback


def run_trial(
    config: dict[str, Any],
    *,
    sweep: SweepConfig,
    folder: Path,
    references: dict[str, Any],
    threads: int,
) -> None:
    """One trial, in an actor that is used again for the next; ``folder`` is the driver's."""
    work_in(folder)
    torch.set_num_threads(threads)
    run = sweep.run(changes_of(config))
    reference = references[inputs_key(run)]
    if run.workers == 1:
        with suppress(_GenerationEnded):
            train_here(run, ray.get(reference), partial(_report, run, config.get("until")))
    else:
        train_with_callback(run, reference, _Epochs(), tune.report)


class _Epochs(TuneReportCallback):
    """Tells Tune of epochs, and nothing of checkpoints within one."""

    def after_report(self, run_context: Any, metrics: list[Metrics], checkpoint: Any) -> None:
        if metrics[0]:
            super().after_report(run_context, metrics, checkpoint)


class _GenerationEnded(BaseException):  # no error: nothing between here and the loop handles it
    """A trial has come as far as it shall; its checkpoint is kept, and another goes on from it."""


def _report(run: RunConfig, until: int | None, metrics: Metrics) -> None:
    tune.report(metrics)
    if metrics["epoch"] == until and until != run.epochs:
        raise _GenerationEnded


def changes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's changes, by dotted path."""
    return dict(config["point"])
