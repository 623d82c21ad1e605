"""The trials of a sweep on Ray Tune: the space as Tune takes it, one trial, and who follows it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from pipelines import jobs
from pipelines.cluster import gpus_there, num_cores, worker_resources, workers_at_once
from pipelines.pruning import PruneConfigurations
from pipelines.report import Trial
from pipelines.runs import Run
from pipelines.searchers import ProposeByOptuna, proposals_in
from pipelines.sharing import inputs_key
from pipelines.space import SEED, SweepConfig, points
from pipelines.tracking import TrackedRun, Tracker
from pipelines.train import OnEpoch, RunInputs, finished
from pipelines.trial import changes_of, run_trial

PROPOSALS = "proposals.jsonl"  # of a search that learns, in the sweep's folder


def run_trials(
    config: SweepConfig,
    inputs: Mapping[str, RunInputs],
    *,
    proposals: Path,
    watch: jobs.Watch,
    tracker: Tracker,
    parent: TrackedRun,
) -> list[Trial]:
    """Run every trial of the sweep; ``inputs`` go once into the object store of each node.

    What a search that learns has proposed is kept in the folder ``proposals``, so that a sweep that
    is called again goes on from there.
    """
    # trials that drive workers hold no CPU: more of them than fit would fight for their workers
    fitting = _fitting(config)
    concurrent = min(fitting, config.search.max_concurrent or fitting)
    base = config.base.model_copy(update={"runs": config.base.runs.absolute()})
    placed = config.model_copy(update={"base": base})
    references = {key: ray.put(held) for key, held in inputs.items()}
    trainable = tune.with_parameters(
        run_trial, sweep=placed, references=references, threads=max(1, num_cores() // concurrent)
    )
    listed = None if config.search.algorithm == "optuna" else points(config)
    total = config.search.num_samples * config.seeds if listed is None else len(listed)
    follow = Follow(config, inputs, watch=watch, tracker=tracker, parent=parent, total=total)
    # what Tune keeps is thrown away: the runs' own folders are the ones that last
    base.runs.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".tune-", dir=base.runs)
    try:
        results = tune.Tuner(
            tune.with_resources(trainable, _trial_resources(config)),
            param_space={} if listed is None else {"point": tune.grid_search(listed)},
            tune_config=tune.TuneConfig(
                metric=config.search.metric,
                mode=config.search.mode,
                num_samples=total if listed is None else 1,
                max_concurrent_trials=concurrent,
                time_budget_s=config.search.minutes and 60 * config.search.minutes,
                search_alg=_searcher(config, concurrent, folder=proposals),
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
    if len(results) < total and config.search.minutes is None:
        raise RuntimeError(f"only {len(results)} of {total} trials were run; call the sweep again")
    return [_as_trial(config, result) for result in results]


def _searcher(config: SweepConfig, concurrent: int, *, folder: Path) -> Searcher | SearchAlgorithm:
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
    if search.scheduler == "none":
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


def _as_trial(config: SweepConfig, result: tune.Result) -> Trial:
    changes = changes_of(result.config or {})
    run = config.run(changes)
    if result.error is not None:
        words = str(result.error).strip() or type(result.error).__name__
        return Trial(run, changes, {}, is_whole=False, error=words.splitlines()[-1])
    done = finished(run)
    if done is not None:
        return Trial(run, changes, done.best, is_whole=True)
    return Trial(run, changes, _own_metrics(result.metrics or {}), is_whole=False)


@dataclass
class _Followed:
    run: Run
    tracked: TrackedRun
    on_epoch: OnEpoch


class Follow(tune.Callback):
    """Writes what trials report to MLflow, from the driver, and tells how far the sweep is."""

    def __init__(
        self,
        config: SweepConfig,
        inputs: Mapping[str, RunInputs],
        *,
        watch: jobs.Watch,
        tracker: Tracker,
        parent: TrackedRun,
        total: int,
    ) -> None:
        self._config, self._inputs, self._watch = config, inputs, watch
        self._tracker, self._parent, self._total = tracker, parent, total
        self._followed: dict[str, _Followed] = {}  # by identity: a search may propose a run twice
        self._identities: dict[str, str] = {}  # by trial
        self._ended: set[str] = set()
        self._actors: list[ray.actor.ActorHandle] = []

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune stores its callbacks with the experiment; this one belongs to the driver's process
        return (tune.Callback, ())

    def _of(self, trial: Any) -> _Followed:
        if trial.trial_id not in self._identities:
            run = self._config.run(changes_of(trial.config))
            self._identities[trial.trial_id] = run.identity
            self._follow(run)
        return self._followed[self._identities[trial.trial_id]]

    def _follow(self, run: Run) -> None:
        if run.identity not in self._followed:
            inputs = self._inputs[inputs_key(run)]
            tracked = jobs.start_tracking(run, inputs, self._tracker, self._parent)
            on_epoch = jobs.follower(run, tracked, lambda *progress: None)
            self._followed[run.identity] = _Followed(run, tracked, on_epoch)

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._actors.append(trial.temporary_state.ray_actor)
        self._of(trial)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._of(trial).on_epoch(_own_metrics(result))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        whole = (trial.last_result or {}).get("epoch") == self._of(trial).run.epochs
        self._end(trial, "FINISHED" if whole else "KILLED")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial, "FAILED")

    def end_all(self) -> None:
        """Close what a broken-off sweep leaves open; Tune itself leaves its actors at work."""
        for actor in self._actors:
            ray.kill(actor)
        ended = {self._identities[trial_id] for trial_id in self._ended}
        for identity, followed in self._followed.items():
            if identity not in ended:
                followed.tracked.end("KILLED")

    def _end(self, trial: Any, status: str) -> None:
        self._of(trial).tracked.end(status)
        self._ended.add(trial.trial_id)
        metric = self._config.search.metric
        value = (trial.last_result or {}).get(metric)
        shown = status.lower() if value is None else f"{metric} {value:.4f}"
        self._watch("sweep", len(self._ended), self._total, shown)


def _own_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """What the loop reported, without what Tune adds."""
    names = ("epoch", "lr", "seconds")
    return {name: value for name, value in result.items() if "/" in name or name in names}
