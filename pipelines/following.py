"""Who follows the trials of a sweep: MLflow, and the people at the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from pipelines import jobs
from pipelines.report import described
from pipelines.runs import Run
from pipelines.sharing import inputs_key
from pipelines.space import SweepConfig
from pipelines.standing import FAILED, FINISHED, STOPPED, Show, Standing
from pipelines.tracking import TrackedRun, Tracker
from pipelines.train import OnEpoch, RunInputs
from pipelines.trial import changes_of


@dataclass
class _Followed:
    run: Run
    tracked: TrackedRun
    on_epoch: OnEpoch


class Follow(tune.Callback):
    """Writes what trials report to MLflow, from the driver, and shows how far the sweep is."""

    def __init__(
        self,
        config: SweepConfig,
        inputs: Mapping[str, RunInputs],
        *,
        show: Show,
        tracker: Tracker,
        parent: TrackedRun,
        standing: Standing,
    ) -> None:
        self._config, self._inputs, self._show = config, inputs, show
        self._tracker, self._parent, self._standing = tracker, parent, standing
        self._followed: dict[str, _Followed] = {}  # by identity: several trials may be one run
        self._identities: dict[str, str] = {}  # by trial
        self._ended: set[str] = set()
        self._told: dict[str, int] = {}  # epochs, by identity
        self._actors: list[ray.actor.ActorHandle] = []
        # by the folder that Tune's results have: one that failed before it reported has no more
        self.changes: dict[str, dict[str, Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune stores its callbacks with the experiment; this one belongs to the driver's process
        return (tune.Callback, ())

    def _of(self, trial: Any) -> _Followed:
        if trial.trial_id not in self._identities:
            changes = changes_of(trial.config)
            run = self._config.run(changes)
            self._identities[trial.trial_id] = run.identity
            self.changes[trial.path] = changes
            self._follow(run)
            self._standing.begin(trial.trial_id, described(changes), epochs=run.epochs)
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
        self._show(self._standing)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        metrics, followed = own_metrics(result), self._of(trial)
        followed.on_epoch(metrics)
        # a run that goes on tells again what another trial has told
        if metrics["epoch"] > self._told.get(followed.run.identity, 0):
            self._told[followed.run.identity] = int(metrics["epoch"])
            self._standing.report(trial.trial_id, metrics)
        self._show(self._standing)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        epoch, epochs = (trial.last_result or {}).get("epoch"), self._of(trial).run.epochs
        # a trial of a population is done when its generation is, though its run may go on
        done = epoch == trial.config.get("until", epochs)
        status = "FINISHED" if epoch == epochs else "KILLED"
        self._end(trial, FINISHED if done else STOPPED, status=status)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial, FAILED, status="FAILED")

    def end_all(self) -> None:
        """Close what a broken-off sweep leaves open; Tune itself leaves its actors at work."""
        for actor in self._actors:
            ray.kill(actor)
        ended = {self._identities[trial_id] for trial_id in self._ended}
        for identity, followed in self._followed.items():
            if identity not in ended:
                followed.tracked.end("KILLED")

    def _end(self, trial: Any, state: str, *, status: str) -> None:
        self._of(trial).tracked.end(status)
        self._ended.add(trial.trial_id)
        self._standing.end(trial.trial_id, state)
        self._show(self._standing)


def own_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """What the loop reported, without what Tune adds."""
    names = ("epoch", "lr", "seconds")
    return {name: value for name, value in result.items() if "/" in name or name in names}
