"""The trials of a sweep on Ray Tune: the space as Tune takes it, who searches and who stops."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from pipelines.cluster import gpus_there, num_cores, worker_resources, workers_at_once
from pipelines.following import Follow, own_metrics
from pipelines.populations import ProposeGenerations
from pipelines.pruning import PruneConfigurations
from pipelines.report import Trial
from pipelines.searchers import ProposeByOptuna, proposals_in
from pipelines.space import SEED, SweepConfig, points
from pipelines.standing import Show, Standing
from pipelines.tracking import TrackedRun, Tracker
from pipelines.train import RunInputs, finished
from pipelines.trial import changes_of, run_trial

PROPOSALS = "proposals.jsonl"  # of a search that learns, in the sweep's folder


def run_trials(
    config: SweepConfig,
    inputs: Mapping[str, RunInputs],
    *,
    proposals: Path,
    show: Show,
    tracker: Tracker,
    parent: TrackedRun,
) -> list[Trial]:
    """Run every trial of the sweep; ``inputs`` go once into the object store of each node.

    What a search that learns has proposed is kept in the folder ``proposals``, so that a sweep that
    is called again goes on from there. Where trials were lost with their processes or nodes it is
    called again once: what is finished is found finished, the others go on.
    """
    # trials that drive workers hold no CPU: more of them than fit would fight for their workers
    fitting = _fitting(config)
    concurrent = min(fitting, config.search.max_concurrent or fitting)
    base = config.base.model_copy(update={"runs": config.base.runs.absolute()})
    trainable = tune.with_parameters(
        run_trial,
        sweep=config.model_copy(update={"base": base}),
        folder=Path.cwd(),
        references={key: ray.put(held) for key, held in inputs.items()},
        threads=max(1, num_cores() // concurrent),
    )
    followed = partial(Follow, config, inputs, show=show, tracker=tracker, parent=parent)
    tuned = partial(_tuned, config, trainable, concurrent, followed=followed, proposals=proposals)
    budget_s, started = config.search.minutes and 60 * config.search.minutes, time.monotonic()
    trials = tuned(budget_s=budget_s)
    if any(trial.is_lost for trial in trials):
        left_s = budget_s and max(1.0, budget_s - (time.monotonic() - started))
        trials = tuned(budget_s=left_s)
    return trials


@contextmanager
def secrets_kept() -> Iterator[None]:
    """Tune would hand its actors the keys of AWS by their runtime environment, which Ray logs.

    The processes of a node have the keys of that node, as those that write its caches do.
    """
    handed = class_cache.ENV_VARS_TO_PROPAGATE
    keys = {name for name in handed if name.startswith("AWS_")}
    handed -= keys
    try:
        yield
    finally:
        handed |= keys


@secrets_kept()
def _tuned(
    config: SweepConfig,
    trainable: Callable[..., None],
    concurrent: int,
    *,
    followed: Callable[..., Follow],
    proposals: Path,
    budget_s: float | None,
) -> list[Trial]:
    searcher = _searcher(config, concurrent, folder=proposals)
    proposes = isinstance(searcher, ProposeByOptuna | ProposeGenerations)
    listed = [] if proposes else points(config)
    total = searcher.total if proposes else len(listed)
    standing = Standing(total, concurrent, metric=config.search.metric, mode=config.search.mode)
    follow = followed(standing=standing)
    # what Tune keeps is thrown away: the runs' own folders are the ones that last
    runs = config.base.runs.absolute()
    runs.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".tune-", dir=runs)
    try:
        results = tune.Tuner(
            tune.with_resources(trainable, _trial_resources(config)),
            param_space={} if proposes else {"point": tune.grid_search(listed)},
            tune_config=tune.TuneConfig(
                metric=config.search.metric,
                mode=config.search.mode,
                num_samples=total if proposes else 1,
                max_concurrent_trials=concurrent,
                time_budget_s=budget_s,
                search_alg=searcher,
                scheduler=_scheduler(config),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                callbacks=[follow],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        ).fit()
    finally:
        follow.end_all()
        shutil.rmtree(folder, ignore_errors=True)
    begun = [result for result in results if result.path in follow.changes]
    trials = [_as_trial(config, follow.changes[result.path], result) for result in begun]
    lacking = len(results) < total and not all(trial.error for trial in trials)
    if lacking and config.search.minutes is None:
        raise RuntimeError(f"only {len(results)} of {total} trials were run; call the sweep again")
    # a member of several generations is one run
    return list({trial.run.identity: trial for trial in trials}.values())


def _searcher(config: SweepConfig, concurrent: int, *, folder: Path) -> Searcher | SearchAlgorithm:
    if config.search.scheduler == "pbt":
        return ProposeGenerations(config)
    if config.search.algorithm != "optuna":
        # Tune applies its own limit to every searcher but this one
        return BasicVariantGenerator(max_concurrent=concurrent)
    file = folder / PROPOSALS

    def record(proposal: Mapping[str, Any]) -> None:
        with file.open("a") as proposals:
            proposals.write(json.dumps(proposal) + "\n")

    return ProposeByOptuna(config, told=proposals_in(file), record=record)


def _scheduler(config: SweepConfig) -> TrialScheduler:
    search = config.search
    if search.scheduler in ("none", "pbt"):  # generations end by themselves
        return FIFOScheduler()
    return PruneConfigurations(
        search.scheduler,
        metric=search.metric,
        mode=search.mode,
        epochs=config.base.epochs,
        grace=search.grace,
        configuration_of=_configuration,
        is_finished=lambda trial: finished(config.run(changes_of(trial))) is not None,
    )


def _configuration(config: Mapping[str, Any]) -> tuple[str, int]:
    """What the seeds of one configuration have in common, and the seed."""
    changes = changes_of(config)
    seed = changes.pop(SEED, 0)
    return json.dumps(changes, sort_keys=True, default=str), seed


def _fitting(config: SweepConfig) -> int:
    """How many trials run side by side; ValueError where GPUs are asked for that are not there."""
    share = config.search.gpus
    if share is None:
        return max(1, workers_at_once() // config.base.workers)
    gpus = gpus_there()
    if config.base.workers > 1 or share > gpus:
        raise ValueError(
            f"search.gpus: {share:g} a trial, and the cluster has {gpus:g} and the trials "
            f"{config.base.workers} workers of their own; leave it out"
        )
    return max(1, min(num_cores(), int(gpus / share)))


def _trial_resources(config: SweepConfig) -> dict[str, float]:
    """A flat trial works itself; one with workers only waits, and must not hold a CPU of theirs."""
    if config.base.workers > 1:
        return {"memory": 64 * 2**20}
    gpus = {} if config.search.gpus is None else {"GPU": config.search.gpus}
    return worker_resources() | gpus


def _as_trial(config: SweepConfig, changes: Mapping[str, Any], result: tune.Result) -> Trial:
    run = config.run(changes)
    if result.error is not None:
        words = str(result.error).strip() or type(result.error).__name__
        lost = not isinstance(result.error, RayTaskError)
        return Trial(run, changes, {}, False, error=words.splitlines()[-1], is_lost=lost)
    done = finished(run)
    if done is not None:
        return Trial(run, changes, done.best, is_whole=True)
    return Trial(run, changes, own_metrics(result.metrics or {}), is_whole=False)
