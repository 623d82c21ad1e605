"""Who proposes the next configuration of a sweep, and learns from the mean over its seeds."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from ray.tune.search import Searcher

from pipelines.ranges import LISTED, Range
from pipelines.space import VARIANT, SweepConfig

_PRIME = 1_000_003  # so that no other seed of a search comes to the same
Point = dict[str, Any]
# told Optuna's name for every new configuration before it is run
Record = Callable[[Mapping[str, Any]], None]


class ProposeByOptuna(Searcher):
    """Optuna's tree-structured Parzen estimator over a space in which variants have own ranges.

    A proposal is run with every seed of the sweep, and Optuna is told the mean of their best
    epochs, by which the table ranks; a configuration that was stopped early counts with what it had
    reached, one that failed as failed. ``told`` are
    the configurations of an earlier call of the same sweep, which are run again first: finished
    runs are found finished.

    A normal number is proposed evenly within three standard deviations of its mean.

    Source: Akiba and others 2019 (Optuna), arXiv:1907.10902; Bergstra and others 2011 (TPE).
    """

    def __init__(
        self, config: SweepConfig, *, told: Sequence[Mapping[str, Any]], record: Record
    ) -> None:
        search = config.search
        super().__init__(metric=search.metric, mode=search.mode)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(
            direction="maximize" if search.mode == "max" else "minimize",
            # what was told uses up no random numbers: with the same seed it would be drawn again
            sampler=optuna.samplers.TPESampler(
                seed=search.seed + _PRIME * len(told), constant_liar=True
            ),
        )
        self._config, self._record = config, record
        self._told = list(told)
        self._known = len(self._told)
        self._waiting: list[tuple[optuna.Trial, Point]] = []  # seeds of the last proposal
        self._seeds: dict[str, optuna.Trial] = {}
        self._values: dict[int, list[float]] = {}  # by the number of Optuna's trial
        self._proposed = 0
        self._best: dict[str, float] = {}  # of every trial that runs, as its epochs come
        self._pick = max if search.mode == "max" else min

    @property
    def total(self) -> int:
        """How many trials it proposes."""
        return self._config.search.num_samples * self._config.seeds

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> Point | None:
        if not self._waiting:
            if self._proposed == self._config.search.num_samples:
                return Searcher.FINISHED  # type: ignore[no-any-return]
            self._waiting = self._proposal()
        self._seeds[trial_id], point = self._waiting.pop(0)
        return {"point": point}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self.metric in result:
            value = float(result[self.metric])
            self._best[trial_id] = self._pick(value, self._best.get(trial_id, value))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        trial = self._seeds.pop(trial_id)
        if result:
            self.on_trial_result(trial_id, result)
        value = math.nan if error else self._best.pop(trial_id, math.nan)
        values = self._values.setdefault(trial.number, [])
        values.append(value)
        if len(values) < self._config.seeds:
            return
        if any(map(math.isnan, values)):
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, statistics.fmean(values))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what Tune keeps is thrown away, the sweep records its configurations itself."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as nothing is saved."""

    def _proposal(self) -> list[tuple[optuna.Trial, Point]]:
        if self._told:
            self._study.enqueue_trial(dict(self._told.pop(0)))
        trial = self._study.ask()
        point = self._point(trial)
        self._proposed += 1
        if self._proposed > self._known:
            self._record(trial.params)
        return [(trial, seeded) for seeded in self._config.with_seeds(point)]

    def _point(self, trial: optuna.Trial) -> Point:
        point: Point = {}
        if self._config.variants:
            point[VARIANT] = trial.suggest_categorical(VARIANT, list(self._config.variants))
        for path, values in self._config.ranges_of(point.get(VARIANT)).items():
            # a variant's own range may be another than that of the same path elsewhere
            common = values is self._config.space.get(path)
            name = path if common else f"{point[VARIANT]}: {path}"
            point[path] = _suggested(trial, name, values)
        return point


def proposals_in(file: Path) -> list[Mapping[str, Any]]:
    """What an earlier call of the sweep proposed, one line each; none where there is no file.

    A proposal is run once it is written: a last line that was broken off is cut off, and counts for
    nothing.
    """
    written = file.read_bytes() if file.exists() else b""
    whole = written[: written.rfind(b"\n") + 1]
    if whole != written:
        os.truncate(file, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _suggested(trial: optuna.Trial, name: str, values: Range) -> Any:
    if values.kind in LISTED:
        # by its place: Optuna stores numbers and words only, and a value may be a mapping
        return values.given[trial.suggest_categorical(name, list(range(len(values.given))))]
    if values.kind == "randint":
        return trial.suggest_int(name, values.given[0], values.given[1] - 1)
    if values.kind == "quniform":
        low, high = values.multiples[0], values.multiples[-1]
        return trial.suggest_float(name, low, high, step=values.given[2])
    low, high = values.probes[0], values.probes[-1]
    return trial.suggest_float(name, low, high, log=values.kind == "loguniform")
