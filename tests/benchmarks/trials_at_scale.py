"""A thousand trials that do nothing, through the sweep's own path: what following them costs.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/trials_at_scale.py [TRIALS] > RESULT.md

``trials.run_trials`` with Ray Tune, its actors, the callback that follows every trial and MLflow in
sqlite, as a sweep of one machine has them; only the training is left out. Issue 8 asks 1,000 trials
in 10 minutes and 2 GiB in the driver, both growing with the trials and no faster.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipelines.cluster import cluster, num_cores
from pipelines.sharing import inputs_key
from pipelines.sources import read_pictures
from pipelines.space import SweepConfig
from pipelines.standing import Standing
from pipelines.strict import validated
from pipelines.tracking import COMMIT, Tracker, commit
from pipelines.train import Inputs
from pipelines.trials import run_trials

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the trials, at which is measured
ASKED_MINUTES, ASKED_GIB = 10, 2


def no_op(config: dict[str, Any], **given: Any) -> None:
    """What a trial of one epoch tells, without its training."""
    from ray import tune  # after pipelines, which says how Ray's processes prove who they are

    told = {"train/loss": 1.0, "train/top1": 0.5, "val/top1": 0.5, "val/nll": 1.0}
    tune.report(told | {"epoch": 1, "lr": 0.1, "seconds": 0.0})


def sweep_of(count: int) -> SweepConfig:
    base = {
        "student": {"name": "convnet", "params": {"width": 2}},
        "data": {"name": "digits", "limit": 100},
        "epochs": 1,
        "losses": {"ce": {}},
    }
    return validated(SweepConfig, {"base": base, "seeds": count}, where="no-op")


def peak_gib() -> float:
    """The most that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(count: int = 1000) -> None:
    made_at = commit().get(COMMIT, "(none)")
    os.chdir(tempfile.mkdtemp())
    config, tracker = sweep_of(count), Tracker()
    inputs = {inputs_key(config.base): Inputs(read_pictures(config.base.data, "train"))}
    wanted = {int(share * count) for share in SHARES}
    print(f"# Following {count:,} trials that do nothing\n\n`trials_at_scale.py {count}` at commit")
    print(f"{made_at}, wall time, {num_cores()} at once.\n")
    print("| trials | s | trials/s | driver's peak GiB |\n|---:|---:|---:|---:|", flush=True)

    def show(standing: Standing) -> None:
        if standing.done in wanted:
            wanted.remove(standing.done)
            spent = time.perf_counter() - started
            rate = standing.done / spent
            row = (f"{standing.done:,}", f"{spent:.0f}", f"{rate:.1f}", f"{peak_gib():.2f}")
            print(f"| {' | '.join(row)} |", flush=True)

    with cluster(), patch("pipelines.trials.run_trial", no_op):
        started = time.perf_counter()
        with tracker.start("no-op", params={}, tags={}) as parent:
            trials = run_trials(
                config, inputs, proposals=Path(), show=show, tracker=tracker, parent=parent
            )
        spent = time.perf_counter() - started
    logged = tracker.client.search_runs([tracker.experiment_id], max_results=count + 1)
    print(f"\n{len(trials):,} trials, {len(logged) - 1:,} in MLflow, in {spent / 60:.1f} minutes")
    print(f"(asked {ASKED_MINUTES}), {peak_gib():.2f} GiB in the driver (asked {ASKED_GIB}).")


if __name__ == "__main__":
    main(*[int(argument) for argument in sys.argv[1:]])
