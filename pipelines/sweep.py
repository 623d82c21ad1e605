"""A sweep: one cache, many students, one ranked table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import jobs
from pipelines.build import build_teacher, checked
from pipelines.cluster import cluster
from pipelines.config import RunConfig, digest, plain
from pipelines.exports import exported
from pipelines.loop import Metrics
from pipelines.ranges import LISTED
from pipelines.report import Row, Trial, best_trial, ranked, swept_numbers
from pipelines.responses import Response, response_curves, response_maps
from pipelines.sources import Pictures, read_pictures
from pipelines.space import VARIANT, SweepConfig, neighbours
from pipelines.strict import validated
from pipelines.tracking import TrackedRun, Tracker
from pipelines.train import RESULT, Finished, Inputs, Teacher, finished
from pipelines.trial import inputs_key
from pipelines.trials import run_trials

OUTCOME, SWEEP = "ranking.json", "sweep.json"


@dataclass(frozen=True)
class Outcome:
    """What a sweep found."""

    rows: list[Row]  # of the trials that were trained to their end
    failed: list[Trial]
    stopped: list[Trial]  # early, by the scheduler
    teachers: Mapping[str, Metrics]  # by label; val/top1 of the cached ones, test/top1
    best: Trial
    student: Finished
    test: Metrics
    folder: Path


def sweep(config: SweepConfig, *, watch: jobs.Watch, tracker: Tracker, verbose: bool) -> Outcome:
    """Run every trial and judge the students; the test split is seen by the chosen one only."""
    for run in neighbours(config):
        checked(run)
    nested = config.base.workers > 1
    early = config.search.scheduler != "none"
    folder = begun(config)
    with cluster(verbose=verbose, dashboard=nested and early):
        inputs = shared_inputs(config, watch=watch, tracker=tracker)
        tags = {"kd.kind": "sweep", "kd.cache": " ".join(i.fingerprint for i in inputs.values())}
        with tracker.start(folder.name, params=plain(config), tags=tags) as parent:
            trials = run_trials(
                config, inputs, proposals=folder, watch=watch, tracker=tracker, parent=parent
            )
            outcome = _judged(config, trials, inputs)
            held = inputs[inputs_key(outcome.best.run)]
            parent.log(outcome.test, epoch=0)
            parent.log_artifact(outcome.folder / OUTCOME)
            _log_figures(parent, outcome, held, metric=config.search.metric)
            _log_student(parent, outcome, held.pictures)
    return outcome


def sweep_folder(config: SweepConfig) -> Path:
    """Where the table of this very sweep is kept."""
    search = config.search.model_dump(include={"metric", "algorithm", "seed", "scheduler", "grace"})
    content = {
        # the base alone may listen to less than its trials do
        "runs": sorted(run.identity for run in neighbours(config)),
        "variants": config.variants,
        "space": {path: held.model_dump() for path, held in config.space.items()},
        "seeds": config.seeds,
        "search": search,
    }
    return config.base.runs / "sweeps" / f"{config.name}-{digest(content)[:12]}"


def begun(config: SweepConfig) -> Path:
    """The sweep's folder, with what it is, so that it can be taken up again by its name."""
    folder = sweep_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SWEEP).write_text(json.dumps(plain(config), indent=1) + "\n")
    return folder


def begun_sweep(name: str, runs: Path = Path("runs")) -> SweepConfig:
    """The sweep of that name, or of that folder's name, as it was begun.

    Raises ValueError where there is none, or several with that name.
    """
    folders = [file.parent for file in (runs / "sweeps").glob(f"*/{SWEEP}")]
    found = [one for one in folders if name in (one.name, one.name.rpartition("-")[0])]
    if len(found) != 1:
        known = ", ".join(sorted(one.name for one in found or folders)) or "none"
        raise ValueError(f"expected one sweep {name!r} in {runs / 'sweeps'}, there are: {known}")
    content = json.loads((found[0] / SWEEP).read_text())
    return validated(SweepConfig, content, where=str(found[0] / SWEEP))


def best_run(config: SweepConfig) -> RunConfig:
    """The run that a finished sweep chose."""
    file = sweep_folder(config) / OUTCOME
    if not file.exists():
        raise ValueError(f"this sweep has not been run: no {file}; run `kd sweep` first")
    return config.run(json.loads(file.read_text())["best"]["changes"])


def shared_inputs(config: SweepConfig, *, watch: jobs.Watch, tracker: Tracker) -> dict[str, Inputs]:
    """What the trials train on, once for every data set and teacher among them."""
    near, inputs = neighbours(config), {}
    for run in _sharing(config):
        if inputs_key(run) in inputs:
            continue
        layers = _layers_read(near, run)
        inputs[inputs_key(run)] = jobs.prepared(run, watch=watch, tracker=tracker, layers=layers)
    return inputs


def _layers_read(near: Iterable[RunConfig], run: RunConfig) -> Mapping[str, set[str]]:
    """Of the run's teachers the layers that its trials will read, whose losses differ."""
    layers: dict[str, set[str]] = {}
    for other in near:
        taught = other.model_copy(update={"teacher": run.teacher})
        for label, read in taught.teacher_layers.items():
            layers.setdefault(label, set()).update(read)
    return layers


def _sharing(config: SweepConfig) -> Iterator[RunConfig]:
    """A run for every data set and teacher that the sweep's trials can have."""
    for variant in config.variants or [None]:
        shared = {
            path: values
            for path, values in config.ranges_of(variant).items()
            if path.split(".")[0] in ("data", "teacher")
        }
        for path, values in shared.items():
            if values.kind not in LISTED:
                raise ValueError(
                    f"space.{path}: the data and the teacher vary by listed values only"
                )
        named = {VARIANT: variant} if variant else {}
        for listed in itertools.product(*(values.given for values in shared.values())):
            yield config.run(named | dict(zip(shared, listed, strict=True)))


def _judged(config: SweepConfig, trials: list[Trial], inputs: Mapping[str, Inputs]) -> Outcome:
    search = config.search
    rows = ranked(trials, metric=search.metric, mode=search.mode)
    failed = [trial for trial in trials if trial.error]
    stopped = [trial for trial in trials if not trial.error and not trial.is_whole]
    if not rows:
        first = f"; the first with: {failed[0].error}" if failed else ""
        raise RuntimeError(f"none of {len(trials)} trials was trained to its end{first}")
    best = best_trial(rows[0], mode=search.mode)
    student = finished(best.run)
    if student is None:
        raise RuntimeError(f"{best.run.folder} has lost its {RESULT}; run the sweep again")
    outcome = Outcome(
        rows,
        failed,
        stopped,
        teachers={
            label: _teacher_metrics(best.run, label, teacher)
            for label, teacher in inputs[inputs_key(best.run)].teachers.items()
        },
        best=best,
        student=student,
        test=jobs.tested(best.run, jobs.trained_student(best.run, student)),
        folder=sweep_folder(config),
    )
    (outcome.folder / OUTCOME).write_text(json.dumps(_summary(outcome), indent=1) + "\n")
    return outcome


def _log_student(parent: TrackedRun, outcome: Outcome, pictures: Pictures) -> None:
    """The best student, fused, as an MLflow model and in the forms that other programs run."""
    student = jobs.served_student(outcome.best.run, outcome.student, pictures)
    example = pictures.image[:2]
    parent.log_student(student, example)
    try:
        paths = exported(student, example, outcome.folder)
    except ValueError as error:  # no reason to lose the sweep's other results
        parent.tag({"kd.export": str(error)[:500]})
        return
    for path in paths:
        parent.log_artifact(path)


def _log_figures(parent: TrackedRun, outcome: Outcome, inputs: Inputs, *, metric: str) -> None:
    control = next((row for row in outcome.rows if row.is_control), None)
    jobs.log_figures(
        parent,
        outcome.best.run,
        outcome.student,
        inputs,
        {row.label: _histories(row) for row in outcome.rows},
        folder=outcome.folder,
        control=control.label if control else "",
    )
    responses = [
        Response(swept_numbers(row), row.values) for row in outcome.rows if not row.is_control
    ]
    values = control.values if control else ()
    drawn = {
        "responses": response_curves(responses, metric=metric, control=values),
        "pairs": response_maps(responses, metric=metric),
    }
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(outcome.folder / f"{name}.png")
            parent.log_artifact(outcome.folder / f"{name}.png")


def _histories(row: Row) -> list[list[Metrics]]:
    runs = [finished(trial.run) for trial in row.trials]
    return [done.history for done in runs if done is not None]


def _teacher_metrics(run: RunConfig, label: str, teacher: Teacher) -> Metrics:
    pictures = read_pictures(run.data, "train")  # which has every class
    tapped = build_teacher(run.teachers[label], pictures, (), weights=teacher.weights)
    metrics = jobs.tested(run, tapped.net)
    if teacher.accuracy is not None:
        metrics["val/top1"] = teacher.accuracy
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
        "stopped": [trial.changes for trial in outcome.stopped],
        "teachers": outcome.teachers,
        "best": {"weights": str(outcome.student.weights), "changes": outcome.best.changes},
        "test": outcome.test,
    }
