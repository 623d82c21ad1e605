"""What a sweep takes beside its trials: from a trial's start to its first epoch, logging, the rest.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/sweep_overhead.py [TRIALS] [SECONDS]

A sweep of so many trials (4), one after the other, each as many epochs of digits as take so long
(60 s), in an empty folder on a Ray that is warm. Everything is measured within this one run: the
trials' own time is what their epochs say that they took, a trial's start is the time from its
beginning to its first epoch's report less that epoch, logging is what MLflow's calls take in the
driver. The same run without a sweep, trained here, says what is no epoch in every run: building the
network, writing checkpoints. Issue 7 asks: starts after the first under 2 s, what a sweep adds to
its runs at most 5 % of them, logging at most 1 %.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from pipelines.build import checked
from pipelines.cluster import cluster
from pipelines.config import RunConfig
from pipelines.space import SweepConfig, changed
from pipelines.standing import Standing
from pipelines.strict import validated
from pipelines.sweep import sweep
from pipelines.tracking import TrackedRun, Tracker
from pipelines.train import Inputs, finished, train_here

RUN: dict[str, Any] = {
    "student": {"name": "resnet8x4"},
    "data": {"name": "digits", "validation": 0.2},
    "epochs": 2,
    "optimizer": {"lr": 0.05},
    "losses": {"ce": {}},
}


@dataclass
class Clock:
    """When a sweep's trials began and first reported, as its table was told."""

    began: dict[str, float] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)  # less the first epoch
    last: float = 0.0  # when anything was told

    def show(self, standing: Standing) -> None:
        self.last = now = time.perf_counter()
        for name, trial in standing.running.items():
            self.began.setdefault(name, now)
            if trial.epoch and name not in self.starts:
                self.starts[name] = now - self.began[name] - trial.seconds


def no_word(*words: object) -> None:
    pass


def epochs_of(seconds: float) -> int:
    """How many epochs take so long: the second one tells, the first warms up."""
    run = validated(RunConfig, RUN, where="calibration")
    done = train_here(run, Inputs(checked(run)), no_word)
    return max(2, round(seconds / done.history[-1]["seconds"]))


def timed(method: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            spent.append(time.perf_counter() - started)

    return call


def main(trials: int = 4, seconds: int = 60) -> None:
    base = changed(validated(RunConfig, RUN, where="base"), {"epochs": epochs_of(seconds)})
    config = SweepConfig(name="overhead", base=base, seeds=trials)
    config = config.model_copy(
        update={"search": config.search.model_copy(update={"max_concurrent": 1})}
    )
    clock, logging = Clock(), list[float]()
    log = patch.object(TrackedRun, "log", timed(TrackedRun.log, logging))
    with cluster(), log:
        started = time.perf_counter()
        sweep(config, watch=no_word, show=clock.show, tracker=Tracker(), verbose=False)
        whole = time.perf_counter() - started
    alone = changed(base, {"runs": "alone"})
    started_alone = time.perf_counter()
    flat = train_here(alone, Inputs(checked(alone)), no_word).history
    beside = time.perf_counter() - started_alone - sum(epoch["seconds"] for epoch in flat)
    runs = [config.run(point) for point in config.with_seeds({})]
    histories = [held.history for run in runs if (held := finished(run))]
    own = sum(epoch["seconds"] for history in histories for epoch in history)
    first, *others = clock.starts.values()
    before = min(clock.began.values()) - started
    during = clock.last - min(clock.began.values())
    print(f"{trials} trials of {own / trials:.0f} s, {base.epochs} epochs each\n")
    print("| | seconds | of the trials' epochs |\n|---|---:|---:|")
    for name, spent in {
        "epochs": own,
        "before the first trial (store, inputs, Tune)": before,
        "from its beginning to the last one's end, less epochs": during - own,
        "as much of so many runs without a sweep": trials * beside,
        "after it (test split, report, exports, registry)": whole - before - during,
        "logging, in the driver, while trials work": sum(logging),
    }.items():
        print(f"| {name} | {spent:.2f} | {100 * spent / own:.2f} % |")
    print(
        f"\nfrom a trial's start to its first epoch: first {first:.2f} s, others at most ", end=""
    )
    print(f"{max(others):.2f} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main(*map(int, sys.argv[1:]))
        os.chdir(Path(folder).parent)
