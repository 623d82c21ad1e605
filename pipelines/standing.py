"""How far a sweep is: which trials run, what was best so far, how long the rest will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"


@dataclass
class Running:
    """A trial at work."""

    label: str
    epochs: int  # of the whole run
    epoch: int = 0
    seconds: float = 0.0  # that its epochs took
    value: float | None = None  # of the last epoch


@dataclass
class Standing:
    """The trials of a sweep, told of one by one as they begin, report and end."""

    total: int
    at_once: int  # side by side
    metric: str
    mode: str
    running: dict[str, Running] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)  # how many, by state
    best: tuple[float, str] | None = None  # the best epoch so far, and whose
    _seconds: float = 0.0  # that ended trials took

    @property
    def done(self) -> int:
        return self.ended.total()

    @property
    def seconds_left(self) -> float | None:
        """What is left of all trials at the mean of those that ended; None before the first.

        A trial takes what its epochs report, so that one that is found finished counts with what it
        took when it was trained.
        """
        if not self.done or not self._seconds:
            return None
        each = self._seconds / self.done
        begun = sum(min(each, held.seconds) for held in self.running.values())
        return max(0.0, each * (self.total - self.done) - begun) / self.at_once

    def begin(self, trial: str, label: str, *, epochs: int) -> None:
        self.running[trial] = Running(label, epochs)

    def report(self, trial: str, metrics: Mapping[str, float]) -> None:
        held = self.running[trial]
        if metrics["epoch"] <= held.epoch:  # told again, as it is after a failure
            return
        held.epoch, held.value = int(metrics["epoch"]), metrics.get(self.metric)
        held.seconds += metrics.get("seconds", 0.0)
        if held.value is not None and self._is_better(held.value):
            self.best = (held.value, held.label)

    def end(self, trial: str, state: str) -> None:
        self._seconds += self.running.pop(trial).seconds
        self.ended[state] += 1

    def _is_better(self, value: float) -> bool:
        if self.best is None:
            return True
        return value > self.best[0] if self.mode == "max" else value < self.best[0]


# told whenever something has changed
Show = Callable[[Standing], None]


def unseen(standing: Standing) -> None:
    """Shows nothing: for callers whom nobody watches."""
