"""A sweep over runs of graphical models: one teacher, many students, one ranked table."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdcore.dgm.trace import Trace
from pipelines import jobs
from pipelines.cluster import cluster
from pipelines.config import plain
from pipelines.costs import Cost, cost
from pipelines.generative import jobs as generative
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.inputs import GenerativeInputs
from pipelines.generative.models import build_model, load_model
from pipelines.generative.networks import NetworkConfig
from pipelines.generative.samples import conditions
from pipelines.page import write_report
from pipelines.ranking import (
    Chosen,
    Provenance,
    RankedTeacher,
    Ranking,
    Unfinished,
    as_ranked,
    sweep_folder,
    write_ranking,
)
from pipelines.report import Trial, best_trial, ranked
from pipelines.sharing import inputs_key, shared
from pipelines.space import SweepConfig, neighbours
from pipelines.standing import Show
from pipelines.sweep import Outcome, begun
from pipelines.tracking import COMMIT, Tracker, commit
from pipelines.train import finished
from pipelines.trials import run_trials

Prepared = Mapping[str, GenerativeInputs]


def sweep(
    config: SweepConfig,
    *,
    watch: jobs.Watch,
    show: Show,
    tracker: Tracker,
    verbose: bool,
    command: str = "",
) -> Outcome:
    """Run every trial and judge the students; test data are seen by the chosen one only."""
    for run in neighbours(config):
        generative.checked(run)
    folder = begun(config)
    nested = config.base.workers > 1 and config.search.scheduler != "none"
    with cluster(verbose=verbose, dashboard=nested):
        inputs = {
            key: generative.prepared(one.run, watch=watch, tracker=tracker)
            for key, one in shared(config).items()
        }
        tags = {"kd.kind": "sweep", "kd.cache": ""}
        with tracker.start(folder.name, params=plain(config), tags=tags) as parent:
            trials = run_trials(
                config, inputs, proposals=folder, show=show, tracker=tracker, parent=parent
            )
            outcome = _judged(config, trials, inputs)
            held = inputs[inputs_key(outcome.best.run)]
            parent.log(outcome.test, epoch=0)
            paths = [write_ranking(_ranking(config, outcome, inputs, command), folder)]
            paths += generative.described(outcome.best.run, outcome.student, held, folder)
            paths += [*write_report(folder), outcome.student.weights]
            parent.log_inputs(jobs.tracked_inputs(outcome.best.run, held))
            for path in paths:
                parent.log_artifact(path)
    return outcome


def _judged(config: SweepConfig, trials: list[Trial], inputs: Prepared) -> Outcome:
    rows = ranked(trials, metric=config.search.metric, mode=config.search.mode)
    failed = [trial for trial in trials if trial.error]
    if not rows:
        first = f"; the first with: {failed[0].error}" if failed else ""
        raise RuntimeError(f"none of {len(trials)} trials was trained to its end{first}")
    best = best_trial(rows[0], mode=config.search.mode)
    student = finished(best.run)
    if student is None:
        raise RuntimeError(f"{best.run.folder} has lost its result; run the sweep again")
    return Outcome(
        rows,
        failed,
        stopped=[trial for trial in trials if not trial.error and not trial.is_whole],
        teachers=_ranked_teachers(best.run, inputs[inputs_key(best.run)]),
        best=best,
        student=student,
        test=generative.tested(best.run, student, inputs[inputs_key(best.run)]),
        folder=sweep_folder(config),
    )


def _ranking(config: SweepConfig, outcome: Outcome, inputs: Prepared, command: str) -> Ranking:
    best = outcome.best
    held = inputs[inputs_key(best.run)]
    return Ranking(
        name=config.name,
        metric=config.search.metric,
        mode=config.search.mode,
        rows=[as_ranked(row, _cost(row.trials[0].run.model)) for row in outcome.rows],
        failed=[Unfinished(trial.changes, error=trial.error) for trial in outcome.failed],
        stopped=[Unfinished(trial.changes, metrics=trial.metrics) for trial in outcome.stopped],
        teachers=outcome.teachers,
        best=Chosen(best.changes, str(outcome.student.weights), plain(best.run)),
        test=outcome.test,
        made=Provenance(
            command=command,
            commit=commit().get(COMMIT, ""),
            data=held.data[1] if held.data else "",
            caches=[],
            sweep=plain(config),
        ),
    )


def _ranked_teachers(run: GenerativeConfig, inputs: GenerativeInputs) -> list[RankedTeacher]:
    if run.teacher is None or inputs.weights is None:
        return []
    network = run.teacher.network
    load_model(network, inputs.weights)
    return [
        RankedTeacher(
            title="teacher",
            network=network.name,
            weights=str(inputs.weights),
            cache="",
            metrics={},
            cost=_cost(network),
        )
    ]


class _Sampler(nn.Module):
    """A generator as a network from rows to nothing, to be counted."""

    def __init__(self, model: NetworkConfig) -> None:
        super().__init__()
        self.generator, self._model = build_model(model).generator, model

    def forward(self, rows: Tensor) -> None:
        self.generator(Trace(len(rows), inputs=conditions(self._model, rows)))


def _cost(model: NetworkConfig) -> Cost:
    """Of one sample."""
    return cost(_Sampler(model), torch.zeros(1, dtype=torch.int64))
