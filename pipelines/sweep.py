"""A sweep: one cache, many students, one ranked table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipelines import jobs
from pipelines.build import build_teacher, build_used, checked
from pipelines.cards import CARD, model_card
from pipelines.cluster import cluster
from pipelines.config import RunConfig
from pipelines.costs import Cost, cost
from pipelines.digests import digest, file_digest, plain
from pipelines.exports import exported
from pipelines.loop import Metrics
from pipelines.page import write_report
from pipelines.ranking import (
    Chosen,
    Provenance,
    RankedTeacher,
    Ranking,
    Unfinished,
    as_ranked,
    read_ranking,
    sweep_folder,
    write_ranking,
)
from pipelines.registry import register_champion, registered_name, registered_version
from pipelines.report import Row, Trial, best_trial, ranked
from pipelines.runs import Run
from pipelines.sharing import inputs_key, shared
from pipelines.sources import Pictures
from pipelines.space import SweepConfig, neighbours
from pipelines.standing import Show, unseen
from pipelines.strict import validated
from pipelines.tracking import COMMIT, TrackedRun, Tracker, commit
from pipelines.train import RESULT, Finished, Inputs, finished
from pipelines.trials import run_trials

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Outcome:
    """What a sweep found."""

    rows: list[Row]  # of the trials that were trained to their end
    failed: list[Trial]
    stopped: list[Trial]  # early, by the scheduler
    teachers: list[RankedTeacher]
    best: Trial
    student: Finished
    test: Metrics
    folder: Path


def sweep(
    config: SweepConfig,
    *,
    watch: jobs.Watch,
    tracker: Tracker,
    verbose: bool,
    show: Show = unseen,
    command: str = "",
) -> Outcome:
    """Run every trial and judge the students; the test split is seen by the chosen one only.

    ``watch`` is told of what comes before the trials, ``show`` of these. ``command`` is what called
    it, for the report.
    """
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
                config, inputs, proposals=folder, show=show, tracker=tracker, parent=parent
            )
            outcome = _judged(config, trials, inputs)
            held = inputs[inputs_key(outcome.best.run)]
            parent.log(outcome.test, epoch=0)
            ranking = ranking_of(
                config,
                outcome,
                costs=_costs([row.trials[0].run for row in outcome.rows], inputs),
                data=held.pictures.digest,
                caches=[one.fingerprint for one in inputs.values() if one.fingerprint],
                command=command,
            )
            parent.log_artifact(write_ranking(ranking, outcome.folder))
            parent.log_inputs(jobs.tracked_inputs(outcome.best.run, held))
            jobs.draw_embedding(outcome.best.run, outcome.student, held, folder=outcome.folder)
            for path in write_report(outcome.folder):
                parent.log_artifact(path)
            _log_student(parent, outcome, held.pictures, ranking)
    return outcome


def begun(config: SweepConfig) -> Path:
    """The sweep's folder, with what it is, so that it can be taken up again by its name."""
    folder = sweep_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    arriving = folder / f".{SWEEP}"
    arriving.write_text(json.dumps(plain(config), indent=1) + "\n")
    arriving.replace(folder / SWEEP)
    return folder


def begun_sweep(name: str, runs: Path = Path("runs")) -> SweepConfig:
    """The sweep of that name, or of that folder's name or path, as it was begun.

    Raises ValueError where there is none, or several with that name.
    """
    if (Path(name) / SWEEP).is_file():
        return _read_sweep(Path(name))
    folders = [file.parent for file in (runs / "sweeps").glob(f"*/{SWEEP}")]
    found = [one for one in folders if name in (one.name, one.name.rpartition("-")[0])]
    if len(found) != 1:
        known = ", ".join(sorted(one.name for one in found or folders)) or "none"
        raise ValueError(f"expected one sweep {name!r} in {runs / 'sweeps'}, there are: {known}")
    return _read_sweep(found[0])


def _read_sweep(folder: Path) -> SweepConfig:
    content = json.loads((folder / SWEEP).read_text())
    return validated(SweepConfig, content, where=str(folder / SWEEP))


def best_run(config: SweepConfig) -> RunConfig:
    """The run that a finished sweep chose."""
    return config.run(read_ranking(sweep_folder(config)).best.changes)


def shared_inputs(config: SweepConfig, *, watch: jobs.Watch, tracker: Tracker) -> dict[str, Inputs]:
    """What the trials train on, once for every data set and teacher among them."""
    return {
        key: jobs.prepared(one.run, watch=watch, tracker=tracker, layers=one.layers)
        for key, one in shared(config).items()
    }


def judged(
    config: SweepConfig,
    trials: list[Trial],
    *,
    teachers: Callable[[Run], list[RankedTeacher]],
    tested: Callable[[Run, Finished], Metrics],
) -> Outcome:
    """Rank trials of any kind; the best run's teachers and student are measured by its kind.

    Raises RuntimeError where no trial was trained to its end.
    """
    search = config.search
    rows = ranked(trials, metric=search.metric, mode=search.mode)
    failed = [trial for trial in trials if trial.error]
    if not rows:
        first = f"; the first with: {failed[0].error}" if failed else ""
        raise RuntimeError(f"none of {len(trials)} trials was trained to its end{first}")
    best = best_trial(rows[0], mode=search.mode)
    student = finished(best.run)
    if student is None:
        raise RuntimeError(f"{best.run.folder} has lost its {RESULT}; run the sweep again")
    return Outcome(
        rows,
        failed,
        stopped=[trial for trial in trials if not trial.error and not trial.is_whole],
        teachers=teachers(best.run),
        best=best,
        student=student,
        test=tested(best.run, student),
        folder=sweep_folder(config),
    )


def ranking_of(
    config: SweepConfig,
    outcome: Outcome,
    *,
    costs: Iterable[Cost],
    data: str,
    caches: Sequence[str],
    command: str,
) -> Ranking:
    """What was found, and how it was made: of which ``data`` and ``caches``, by their digests."""
    best = outcome.best
    return Ranking(
        name=config.name,
        metric=config.search.metric,
        mode=config.search.mode,
        rows=[as_ranked(row, cost) for row, cost in zip(outcome.rows, costs, strict=True)],
        failed=[Unfinished(trial.changes, error=trial.error) for trial in outcome.failed],
        stopped=[Unfinished(trial.changes, metrics=trial.metrics) for trial in outcome.stopped],
        teachers=outcome.teachers,
        best=Chosen(best.changes, str(outcome.student.weights), plain(best.run)),
        test=outcome.test,
        made=Provenance(
            command=command,
            commit=commit().get(COMMIT, ""),
            data=data,
            caches=list(caches),
            sweep=plain(config),
        ),
    )


def _judged(config: SweepConfig, trials: list[Trial], inputs: Mapping[str, Inputs]) -> Outcome:
    def teachers(run: RunConfig) -> list[RankedTeacher]:
        held = inputs[inputs_key(run)]
        return [_ranked_teacher(run, label, held) for label in held.teachers]

    def tested(run: RunConfig, student: Finished) -> Metrics:
        pictures = inputs[inputs_key(run)].pictures
        return jobs.tested(run, build_used(run, pictures, student.weights))

    return judged(config, trials, teachers=teachers, tested=tested)


def _log_student(
    parent: TrackedRun, outcome: Outcome, pictures: Pictures, ranking: Ranking
) -> None:
    """The best student, fused: the champion of its name, and in the forms that others run."""
    name, digest = registered_name(ranking.name), file_digest(outcome.student.weights)
    if registered_version(parent, name, digest):
        return
    student = jobs.served_student(outcome.best.run, outcome.student, pictures)
    example, card = pictures.image[:2], outcome.folder / CARD
    card.write_text(model_card(ranking))
    parent.log_artifact(card)
    uri = parent.log_student(student, example)
    register_champion(parent, name, uri, card=card.read_text(), digest=digest)
    try:
        paths = exported(student, example, outcome.folder)
    except ValueError as error:  # no reason to lose the sweep's other results
        parent.tag({"kd.export": str(error)[:500]})
        return
    for path in paths:
        parent.log_artifact(path)


def _costs(runs: Iterable[RunConfig], inputs: Mapping[str, Inputs]) -> list[Cost]:
    """Of each run's student as it is used; those that are built alike are measured once."""
    measured: dict[str, Cost] = {}
    costs = []
    for run in runs:
        pictures = inputs[inputs_key(run)].pictures
        key = digest([plain(run.student), pictures.image.shape[1:], pictures.num_classes])
        if key not in measured:
            measured[key] = cost(build_used(run, pictures, None), _blank(pictures))
        costs.append(measured[key])
    return costs


def _ranked_teacher(run: RunConfig, label: str, inputs: Inputs) -> RankedTeacher:
    config, ready = run.teachers[label], inputs.teachers[label]
    tapped = build_teacher(config, inputs.pictures, (), weights=ready.weights)
    metrics = jobs.tested(run, tapped.net)
    if ready.accuracy is not None:
        metrics["val/top1"] = ready.accuracy
    return RankedTeacher(
        title=run.called(label),
        network=config.network.name,
        weights=str(ready.weights),
        cache=ready.fingerprint,
        metrics=metrics,
        cost=cost(tapped.net.cpu(), _blank(inputs.pictures)),
    )


def _blank(pictures: Pictures) -> Tensor:
    return torch.zeros(1, *pictures.image.shape[1:])
