"""A sweep over runs of graphical models: one teacher, many students, one ranked table."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdcore.dgm.trace import Trace
from pipelines import jobs
from pipelines.cluster import cluster
from pipelines.costs import Cost, cost
from pipelines.digests import plain
from pipelines.generative import jobs as generative
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.inputs import GenerativeInputs
from pipelines.generative.models import build_model, load_model
from pipelines.generative.networks import NetworkConfig
from pipelines.generative.samples import conditions
from pipelines.loop import Metrics
from pipelines.page import write_report
from pipelines.ranking import RankedTeacher, write_ranking
from pipelines.report import Trial
from pipelines.sharing import inputs_key, shared
from pipelines.space import SweepConfig, neighbours
from pipelines.standing import Show
from pipelines.sweep import Outcome, begun, judged, ranking_of
from pipelines.tracking import Tracker
from pipelines.train import Finished
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
                costs=[_cost(row.trials[0].run.model) for row in outcome.rows],
                data=held.data[1] if held.data else "",
                caches=[one.fingerprint for one in inputs.values() if one.fingerprint],
                command=command,
            )
            paths = [write_ranking(ranking, folder)]
            paths += generative.described(outcome.best.run, outcome.student, held, folder)
            paths += [*write_report(folder), outcome.student.weights]
            parent.log_inputs(jobs.tracked_inputs(outcome.best.run, held))
            for path in paths:
                parent.log_artifact(path)
    return outcome


def _judged(config: SweepConfig, trials: list[Trial], inputs: Prepared) -> Outcome:
    def teachers(run: GenerativeConfig) -> list[RankedTeacher]:
        return _ranked_teachers(run, inputs[inputs_key(run)])

    def tested(run: GenerativeConfig, student: Finished) -> Metrics:
        return generative.tested(run, student, inputs[inputs_key(run)])

    return judged(config, trials, teachers=teachers, tested=tested)


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
            cache=inputs.fingerprint,
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
