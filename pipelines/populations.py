"""Population-based training of schedules: the worst members go on from where the best are."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from pipelines.ranges import Range
from pipelines.space import SEED, SweepConfig, points
from pipelines.train import branch_off

_QUARTER = 4  # one in so many is replaced, and one in so many is followed
_FACTORS = (0.8, 1.2)
_RESAMPLED = 0.25  # probability that a number is drawn anew, as in Ray's own scheduler
Point = dict[str, Any]


class ProposeGenerations(Searcher):
    """Trains a population in generations of ``search.grace`` epochs.

    A member is an ordinary run of all epochs, whose swept numbers are schedules that change between
    generations only. Two runs whose schedules agree up to an epoch are the same run up to there.
    So a member of the worst quarter is replaced by a new run with the schedules of one of the best
    quarter, from here on multiplied by 0.8 or 1.2 or drawn again, within their ranges, that begins
    with a copy of that one's state. Whatever comes out is a run that can be trained from its
    configuration alone, to the same numbers. Members are judged by the mean over their seeds at the
    generation's last epoch; one that failed is replaced.

    Nothing is kept: called again, the sweep finds its members' runs, which say what they said.

    Source: Jaderberg and others 2017, arXiv:1711.09846, truncation selection, with quarters instead
    of fifths.
    """

    def __init__(self, config: SweepConfig) -> None:
        search = config.search
        super().__init__(metric=search.metric, mode=search.mode)
        self._config, self._epochs = config, config.base.epochs
        self._sign = 1.0 if search.mode == "max" else -1.0
        self._members = _first_generation(config)
        self._until = 0  # the generation's last epoch
        self._waiting: list[tuple[int, Point]] = []
        self._at_work: dict[str, int] = {}  # members, by trial
        self._last: dict[str, float] = {}  # what a trial reported last, greater is better
        self._values: dict[int, list[float]] = defaultdict(list)

    @property
    def total(self) -> int:
        """How many trials there are: of every member, generation and seed one."""
        generations = math.ceil(self._epochs / self._config.search.grace)
        return len(self._members) * self._config.seeds * generations

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if not self._waiting:
            if self._at_work:
                return None
            if self._until == self._epochs or not self._advanced():
                return Searcher.FINISHED  # type: ignore[no-any-return]
        self._at_work[trial_id], point = self._waiting.pop(0)
        return {"point": point, "until": self._until}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self.metric in result:
            self._last[trial_id] = self._sign * float(result[self.metric])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self.on_trial_result(trial_id, result or {})
        value = self._last.pop(trial_id, math.nan)
        self._values[self._at_work.pop(trial_id)].append(math.nan if error else value)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what Tune keeps is thrown away."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as nothing is saved."""

    def _advanced(self) -> bool:
        """Begin the next generation, unless nobody came through the last."""
        if self._until > 0:
            means = {member: statistics.fmean(held) for member, held in self._values.items()}
            if all(map(math.isnan, means.values())):
                return False
            self._replace_worst(means)
        self._values.clear()
        self._until = min(self._until + self._config.search.grace, self._epochs)
        self._waiting = [
            (member, seeded)
            for member, point in enumerate(self._members)
            for seeded in self._config.with_seeds(point)
        ]
        return True

    def _replace_worst(self, means: Mapping[int, float]) -> None:
        well = sorted(
            (member for member, mean in means.items() if not math.isnan(mean)),
            key=lambda member: -means[member],
        )
        quarter = max(1, len(means) // _QUARTER)
        best, rest = well[:quarter], well[quarter:]
        failed = sorted(means.keys() - set(well))
        worst = [*failed, *rest[max(0, len(rest) - quarter + len(failed)) :]]
        for member in worst:
            random = np.random.default_rng([self._config.search.seed, self._until, member])
            parent = self._members[best[random.integers(len(best))]]
            child = {
                path: _extended(parent[path], self._until, values, random)
                for path, values in self._config.space.items()
            }
            for run, copied in zip(self._runs(child), self._runs(parent), strict=True):
                branch_off(run, copied, epochs=self._until)
            self._members[member] = child

    def _runs(self, point: Point) -> Iterator[Any]:
        return map(self._config.run, self._config.with_seeds(point))


def _first_generation(config: SweepConfig) -> list[Point]:
    """The configurations of a random search, seeds apart."""
    found: dict[str, Point] = {}
    for point in points(config):
        member = {path: value for path, value in point.items() if path != SEED}
        found.setdefault(str(member), member)
    return list(found.values())


def _extended(held: Any, epoch: int, values: Range, random: np.random.Generator) -> dict[str, Any]:
    """The schedule, a number for a constant one, with another value from an epoch on."""
    steps = dict(held["steps"]) if isinstance(held, Mapping) else {0: held}
    low, high = values.given
    if random.random() < _RESAMPLED:
        return {"steps": {**steps, epoch: values.draw(random)}}
    number = steps[max(steps)] * _FACTORS[random.integers(len(_FACTORS))]
    return {"steps": {**steps, epoch: min(max(number, low), high)}}
