"""Which configurations of a sweep are stopped early, judged by the mean over their seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

Rule = Literal["asha", "median"]
_REDUCTION = 4  # ASHA keeps the best quarter at every rung
_STARTUP = 3  # configurations that must have come as far before the median judges one


class PruneConfigurations(FIFOScheduler):
    r"""Stops a configuration with all of its seeds where it falls behind others at one epoch.

    What is compared is the mean over the seeds that have come so far. "asha" compares at epochs 1,
    4, 16, ...: who is not among the best quarter there is stopped. "median" compares at every
    epoch: who is worse than the median of the others is stopped, once three others have come so
    far. A seed of a stopped configuration that starts later is stopped at its first epoch. Nobody
    is stopped at the last epoch, and a trial that is told again has no second vote.

    Ray's own schedulers judge every seed by itself, so that a lucky one outlives its configuration.

    Source: Li and others 2020 (ASHA), arXiv:1810.05934, algorithm 2; Golovin and others 2017
    (Vizier), section 3.2.2, with the value at the epoch instead of a running average.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        metric: str,
        mode: str,
        epochs: int,
        configuration_of: Callable[[Mapping[str, Any]], Hashable],
    ) -> None:
        super().__init__()
        self._rule, self._name, self._epochs = rule, metric, epochs
        self._sign = 1.0 if mode == "max" else -1.0
        self._configuration_of = configuration_of
        # epoch: configuration: trial: value, greater is better
        self._values: dict[int, dict[Hashable, dict[str, float]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        self._stopped: set[Hashable] = set()

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        epoch = int(result["epoch"])
        configuration = self._configuration_of(trial.config)
        if epoch >= self._epochs:
            return str(TrialScheduler.CONTINUE)
        if self._name in result and configuration not in self._stopped:
            value = self._sign * float(result[self._name])
            self._values[epoch][configuration][trial.trial_id] = value
            if self._falls_behind(configuration, epoch):
                self._stopped.add(configuration)
        stopped = configuration in self._stopped
        return str(TrialScheduler.STOP if stopped else TrialScheduler.CONTINUE)

    def _falls_behind(self, configuration: Hashable, epoch: int) -> bool:
        means = {
            other: statistics.fmean(values.values())
            for other, values in self._values[epoch].items()
        }
        own, others = means.pop(configuration), list(means.values())
        if self._rule == "median":
            return len(others) >= _STARTUP and own < statistics.median(others)
        better = sum(value > own for value in others)
        return _is_rung(epoch) and better >= max(1, (len(others) + 1) // _REDUCTION)


def _is_rung(epoch: int) -> bool:
    """Whether the epoch is a power of the reduction: 1, 4, 16, ..."""
    while epoch % _REDUCTION == 0:
        epoch //= _REDUCTION
    return epoch == 1
