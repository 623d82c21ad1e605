"""The trials of a sweep on Ray Tune: the space as Tune takes it, one trial, and who follows it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from pipelines import jobs
from pipelines.cluster import num_cores, worker_resources, workers_at_once
from pipelines.config import RunConfig
from pipelines.report import Trial
from pipelines.space import Range, SweepConfig, distinct, grid_points
from pipelines.tracking import TrackedRun, Tracker
from pipelines.train import Inputs, OnEpoch, finished
from pipelines.trial import changes_of, inputs_key, run_trial


def run_trials(
    config: SweepConfig,
    inputs: Mapping[str, Inputs],
    *,
    watch: jobs.Watch,
    tracker: Tracker,
    parent: TrackedRun,
) -> list[Trial]:
    """Run every trial of the sweep; ``inputs`` go once into the object store of each node."""
    # trials that drive workers hold no CPU: more of them than fit would fight for their workers
    fitting = max(1, workers_at_once() // config.base.workers)
    concurrent = min(fitting, config.search.max_concurrent or fitting)
    folders = {"runs": config.base.runs.absolute(), "caches": config.base.caches.absolute()}
    base = config.base.model_copy(update=folders)
    placed = config.model_copy(update={"base": base})
    references = {key: ray.put(held) for key, held in inputs.items()}
    trainable = tune.with_parameters(
        run_trial, sweep=placed, references=references, threads=max(1, num_cores() // concurrent)
    )
    space, total = _tune_space(config)
    follow = _Follow(config, inputs, watch=watch, tracker=tracker, parent=parent, total=total)
    # what Tune keeps is thrown away: the runs' own folders are the ones that last
    base.runs.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".tune-", dir=base.runs)
    try:
        results = tune.Tuner(
            tune.with_resources(trainable, _trial_resources(config)),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=config.search.metric,
                mode=config.search.mode,
                num_samples=config.search.num_samples,
                max_concurrent_trials=concurrent,
                search_alg=_searcher(config, concurrent),
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
    if len(results) < total:
        raise RuntimeError(f"only {len(results)} of {total} trials were run; call the sweep again")
    return [_as_trial(config, result) for result in results]


def _tune_space(config: SweepConfig) -> tuple[dict[str, Any], int]:
    """The space as Tune takes it, and the number of its trials."""
    if config.search.algorithm == "grid":
        points = distinct(config, grid_points(config.whole_space))
        return {"point": tune.grid_search(points)}, len(points)
    whole = config.whole_space
    space = {path: _domain(values, config.search.algorithm) for path, values in whole.items()}
    grids = 1
    if config.search.algorithm == "random":
        grids = len(grid_points({p: v for p, v in whole.items() if v.kind == "grid"}))
    return space, grids * config.search.num_samples


def _domain(values: Range, algorithm: str) -> Any:
    listed = getattr(values, values.kind)
    if values.kind == "grid":
        # Optuna takes no grids: there the listed values are choices
        return tune.grid_search(listed) if algorithm == "random" else tune.choice(listed)
    if values.kind == "choice":
        return tune.choice(listed)
    return {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}[
        values.kind
    ](*listed)


def _searcher(config: SweepConfig, concurrent: int) -> Searcher | SearchAlgorithm:
    if config.search.algorithm != "optuna":
        # Tune applies its own limit to every searcher but this one
        return BasicVariantGenerator(max_concurrent=concurrent, random_state=config.search.seed)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return OptunaSearch(
        metric=config.search.metric, mode=config.search.mode, seed=config.search.seed
    )


def _scheduler(config: SweepConfig) -> ASHAScheduler | None:
    if config.search.scheduler == "none":
        return None
    # one epoch more than there are: ASHA stops whoever reaches max_t before it can write its result
    return ASHAScheduler(time_attr="epoch", max_t=config.base.epochs + 1)


def _trial_resources(config: SweepConfig) -> dict[str, float]:
    """A flat trial works itself; one with workers only waits, and must not hold a CPU of theirs."""
    return worker_resources() if config.base.workers == 1 else {"memory": 64 * 2**20}


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
    run: RunConfig
    tracked: TrackedRun
    on_epoch: OnEpoch


class _Follow(tune.Callback):
    """Writes what trials report to MLflow, from the driver, and tells how far the sweep is."""

    def __init__(
        self,
        config: SweepConfig,
        inputs: Mapping[str, Inputs],
        *,
        watch: jobs.Watch,
        tracker: Tracker,
        parent: TrackedRun,
        total: int,
    ) -> None:
        self._config, self._inputs, self._watch = config, inputs, watch
        self._tracker, self._parent, self._total = tracker, parent, total
        self._followed: dict[str, _Followed] = {}
        self._ended: set[str] = set()
        self._actors: list[ray.actor.ActorHandle] = []

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune stores its callbacks with the experiment; this one belongs to the driver's process
        return (tune.Callback, ())

    def _of(self, trial: Any) -> _Followed:
        if trial.trial_id not in self._followed:
            run = self._config.run(changes_of(trial.config))
            inputs = self._inputs[inputs_key(run)]
            tracked = jobs.start_tracking(run, inputs, self._tracker, self._parent)
            on_epoch = jobs.follower(run, tracked, lambda *progress: None)
            self._followed[trial.trial_id] = _Followed(run, tracked, on_epoch)
        return self._followed[trial.trial_id]

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
        for trial_id, followed in self._followed.items():
            if trial_id not in self._ended:
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
