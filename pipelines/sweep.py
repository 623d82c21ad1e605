"""A sweep on Ray Tune: one cache, many students, one ranked table."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from pipelines import jobs
from pipelines.cluster import cluster, num_cores, worker_resources, workers_at_once
from pipelines.config import RunConfig, digest, plain
from pipelines.loop import Metrics
from pipelines.report import Row, Trial, best_trial, ranked
from pipelines.space import Range, SweepConfig, changed
from pipelines.tracking import TrackedRun, Tracker
from pipelines.train import Finished, Inputs, finished, train_here, train_with_callback

OUTCOME = "ranking.json"


@dataclass(frozen=True)
class Outcome:
    """What a sweep found."""

    rows: list[Row]
    failed: list[Trial]
    teacher: Metrics  # val/top1 where the teacher was cached, test/top1
    best: Trial
    student: Finished
    test: Metrics
    folder: Path


def sweep(config: SweepConfig, *, watch: jobs.Watch, tracker: Tracker, verbose: bool) -> Outcome:
    """Run every trial and judge the students; the test split is seen by the chosen one only."""
    nested = config.base.workers > 1
    early = config.search.scheduler != "none"
    with cluster(verbose=verbose, dashboard=nested and early):
        inputs = shared_inputs(config, watch=watch, tracker=tracker)
        first = next(iter(inputs.values()))
        parent = tracker.start(config.name, params=plain(config), tags=_tags(first))
        try:
            trials = _trials(config, inputs, watch, tracker, parent)
            outcome = _judged(config, trials, first)
            served = jobs.servable(outcome.best.run, outcome.student, first.pictures)
            parent.log_student(served, first.pictures.image[:2])
            parent.log(outcome.test, epoch=0)
            parent.log_artifact(outcome.folder / OUTCOME)
        except BaseException:
            parent.end("FAILED")
            raise
    parent.end()
    return outcome


def sweep_folder(config: SweepConfig) -> Path:
    """Where the table of this very sweep is kept."""
    content = {**plain(config), "base": config.base.identity, "name": None}
    return config.base.runs / "sweeps" / f"{config.name}-{digest(content)[:12]}"


def best_run(config: SweepConfig) -> RunConfig:
    """The run that a finished sweep chose."""
    file = sweep_folder(config) / OUTCOME
    if not file.exists():
        raise ValueError(f"this sweep has not been run: no {file}; run `kd sweep` first")
    return changed(config.base, json.loads(file.read_text())["best"]["changes"])


def grid_points(space: Mapping[str, Range]) -> list[dict[str, Any]]:
    """Every combination of the listed values, as changes by dotted path."""
    values = [space[path].probes for path in space]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]


def distinct(base: RunConfig, points: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points that make different runs: a weight of 0 makes one control of all losses."""
    seen: dict[str, dict[str, Any]] = {}
    for point in points:
        seen.setdefault(changed(base, point).identity, dict(point))
    return list(seen.values())


def shared_inputs(config: SweepConfig, *, watch: jobs.Watch, tracker: Tracker) -> dict[str, Inputs]:
    """What the trials train on, once for every data set and teacher among them.

    Every listed loss is built once, so that what does not fit is said before anything is trained.
    """
    runs = [
        changed(config.base, {path: value})
        for path, values in config.space.items()
        for value in values.probes
    ]
    layers = {layer for run in (config.base, *runs) for layer in run.teacher_layers}
    shared = {
        path: values
        for path, values in config.space.items()
        if path.split(".")[0] in ("data", "teacher")
    }
    for path, values in shared.items():
        if values.kind not in ("grid", "choice"):
            raise ValueError(f"space.{path}: the data and the teacher vary by listed values only")
    inputs = {}
    for point in grid_points(shared):
        run = changed(config.base, point)
        inputs[_inputs_key(run)] = jobs.prepared(run, watch=watch, tracker=tracker, layers=layers)
    pictures = next(iter(inputs.values())).pictures
    for path, values in config.space.items():
        if path.split(".")[0] in ("losses", "student"):
            for value in values.probes:
                jobs.build_step(changed(config.base, {path: value}), pictures)
    return inputs


def _inputs_key(run: RunConfig) -> str:
    content = plain(run)
    return digest([content["data"], content["teacher"]])


def _trials(
    config: SweepConfig,
    inputs: Mapping[str, Inputs],
    watch: jobs.Watch,
    tracker: Tracker,
    parent: TrackedRun,
) -> list[Trial]:
    concurrent = config.search.max_concurrent or max(1, workers_at_once() // config.base.workers)
    base = config.base.model_copy(
        update={"runs": config.base.runs.absolute(), "caches": config.base.caches.absolute()}
    )
    references = {key: ray.put(held) for key, held in inputs.items()}
    trainable = tune.with_parameters(
        _trial, base=base, references=references, threads=max(1, num_cores() // concurrent)
    )
    space, total = _tune_space(config)
    follow = _Follow(config, inputs, watch, tracker, parent, total)
    folder = tempfile.mkdtemp(prefix="kdsweep-tune-")  # our own folders are the ones that last
    try:
        results = tune.Tuner(
            tune.with_resources(trainable, _trial_resources(config)),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=config.search.metric,
                mode=config.search.mode,
                num_samples=config.search.num_samples,
                max_concurrent_trials=concurrent,
                search_alg=_searcher(config),
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
        shutil.rmtree(folder, ignore_errors=True)
    return [_as_trial(config.base, result) for result in results]


def _trial(
    config: dict[str, Any], *, base: RunConfig, references: dict[str, Any], threads: int
) -> None:
    """One trial, in an actor that is used again for the next."""
    run = changed(base, _changes(config))
    done = finished(run)
    if done is not None:
        for metrics in done.history:
            tune.report(metrics)
        return
    torch.set_num_threads(threads)
    reference = references[_inputs_key(run)]
    if run.workers == 1:
        train_here(run, ray.get(reference), tune.report)
    else:
        train_with_callback(run, reference, TuneReportCallback())


def _changes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's changes: one point of the grid, or a drawn value per dotted path."""
    return dict(config.get("point", config))


def _tune_space(config: SweepConfig) -> tuple[dict[str, Any], int]:
    """The space as Tune takes it, and the number of its trials."""
    if config.search.algorithm == "grid":
        points = distinct(config.base, grid_points(config.space))
        return {"point": tune.grid_search(points)}, len(points) * config.search.num_samples
    space = {
        path: _domain(values, config.search.algorithm) for path, values in config.space.items()
    }
    grids = 1
    if config.search.algorithm == "random":
        grids = len(grid_points({p: v for p, v in config.space.items() if v.kind == "grid"}))
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


def _searcher(config: SweepConfig) -> OptunaSearch | None:
    if config.search.algorithm != "optuna":
        return None
    return OptunaSearch(
        metric=config.search.metric, mode=config.search.mode, seed=config.search.seed
    )


def _scheduler(config: SweepConfig) -> ASHAScheduler | None:
    if config.search.scheduler == "none":
        return None
    return ASHAScheduler(time_attr="training_iteration", max_t=config.base.epochs)


def _trial_resources(config: SweepConfig) -> dict[str, float]:
    """A flat trial works itself; one with workers only waits, and must not hold a CPU of theirs."""
    return worker_resources() if config.base.workers == 1 else {"memory": 64 * 2**20}


def _as_trial(base: RunConfig, result: tune.Result) -> Trial:
    changes = _changes(result.config or {})
    error = "" if result.error is None else str(result.error).strip().splitlines()[-1]
    return Trial(changed(base, changes), changes, result.metrics or {}, error)


class _Follow(tune.Callback):
    """Writes what trials report to MLflow, from the driver, and tells how far the sweep is."""

    def __init__(
        self,
        config: SweepConfig,
        inputs: Mapping[str, Inputs],
        watch: jobs.Watch,
        tracker: Tracker,
        parent: TrackedRun,
        total: int,
    ) -> None:
        self.config, self.inputs, self.watch = config, inputs, watch
        self.tracker, self.parent, self.total = tracker, parent, total
        self.tracked: dict[str, TrackedRun] = {}
        self.follow: dict[str, Any] = {}
        self.ended: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune stores its callbacks with the experiment; this one belongs to the driver's process
        return (tune.Callback, ())

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if trial.trial_id not in self.follow:
            run = changed(self.config.base, _changes(trial.config))
            inputs = self.inputs[_inputs_key(run)]
            tracked = jobs.start_tracking(run, inputs, self.tracker, self.parent)
            self.tracked[trial.trial_id] = tracked
            self.follow[trial.trial_id] = jobs.follower(run, tracked, lambda *progress: None)
        numbers = {
            name: value for name, value in result.items() if "/" in name or name in _OWN_METRICS
        }
        self.follow[trial.trial_id](numbers)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "FAILED")

    def _end(self, trial: Any, status: str) -> None:
        if trial.trial_id in self.tracked:
            self.tracked[trial.trial_id].end(status)
        self.ended.add(trial.trial_id)
        value = (trial.last_result or {}).get(self.config.search.metric)
        shown = status.lower() if value is None else f"{self.config.search.metric} {value:.4f}"
        self.watch("sweep", len(self.ended), self.total, shown)


_OWN_METRICS = ("epoch", "lr", "seconds")


def _judged(config: SweepConfig, trials: list[Trial], inputs: Inputs) -> Outcome:
    search = config.search
    rows = ranked(trials, metric=search.metric, mode=search.mode)
    failed = [trial for trial in trials if trial.error]
    if not rows:
        raise RuntimeError(f"all {len(trials)} trials failed; the first with: {failed[0].error}")
    best = best_trial(rows[0], mode=search.mode)
    student = finished(best.run)
    if student is None:
        raise RuntimeError(f"the best trial was stopped before its end: {best.changes}")
    test = jobs.tested(best.run, jobs.student_network(best.run, student))
    teacher = _teacher_metrics(config.base, inputs)
    outcome = Outcome(rows, failed, teacher, best, student, test, sweep_folder(config))
    outcome.folder.mkdir(parents=True, exist_ok=True)
    (outcome.folder / OUTCOME).write_text(json.dumps(_summary(outcome), indent=1) + "\n")
    return outcome


def _teacher_metrics(run: RunConfig, inputs: Inputs) -> Metrics:
    if inputs.network is None:
        return {}
    metrics = jobs.tested(run, inputs.network)
    if inputs.rows is not None:
        metrics["val/top1"] = jobs.teacher_accuracy(run, inputs)
    return metrics


def _summary(outcome: Outcome) -> dict[str, Any]:
    return {
        "rows": [
            {
                "label": row.label,
                "control": row.is_control,
                "mean": row.mean,
                "sd": None if len(row.values) < 2 else row.deviation,
                "values": row.values,
                "runs": [str(trial.run.folder) for trial in row.trials],
            }
            for row in outcome.rows
        ],
        "failed": [{"changes": trial.changes, "error": trial.error} for trial in outcome.failed],
        "teacher": outcome.teacher,
        "best": {"weights": str(outcome.student.weights), "changes": outcome.best.changes},
        "test": outcome.test,
    }


def _tags(inputs: Inputs) -> dict[str, str]:
    return {"kd.cache": inputs.fingerprint, "kd.kind": "sweep"}
