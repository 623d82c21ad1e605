"""A finished sweep as a ranked table."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kdcore.checks import unknown_name
from pipelines.runs import Run
from pipelines.space import VARIANT, changed


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: what was changed for it, and what its best epoch measured.

    Of a run that did not reach its end, ``metrics`` are the last that it reported.
    """

    run: Run
    changes: Mapping[str, Any]
    metrics: Mapping[str, float]
    is_whole: bool  # trained to its end: neither failed nor stopped by the scheduler
    error: str = ""
    is_lost: bool = False  # it failed with its process or node, not by what it does


@dataclass
class Row:
    """One configuration over its seeds."""

    label: str
    is_control: bool
    setting: str  # what was changed beside the losses and the seed
    trials: list[Trial] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    lacking: int = 0  # seeds that were stopped or failed

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over seeds; NaN for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


def ranked(trials: Iterable[Trial], *, metric: str, mode: str) -> list[Row]:
    """One row per configuration, seeds together, the best mean first; of whole trials only.

    Configurations that lack seeds come last: the mean of the lucky ones is not theirs.

    Raises ValueError, with the metrics that there are, where a trial did not report ``metric``.
    """
    rows: dict[str, Row] = {}
    lacking: Counter[str] = Counter()
    for trial in trials:
        key = changed(trial.run, {"seed": 0}).identity
        if not trial.is_whole:
            lacking[key] += 1
            continue
        if metric not in trial.metrics:
            raise ValueError(unknown_name("metric", metric, trial.metrics))
        row = rows.setdefault(key, Row(_label(trial), trial.run.is_control, _setting(trial)))
        if trial.run.identity in {other.run.identity for other in row.trials}:
            continue  # the same run drawn again is no further seed
        row.trials.append(trial)
        row.values.append(trial.metrics[metric])
    for key, row in rows.items():
        row.lacking = lacking[key]
    sign = -1 if mode == "max" else 1
    return sorted(rows.values(), key=lambda row: (row.lacking > 0, sign * row.mean))


def swept_numbers(row: Row) -> dict[str, float]:
    """What the sweep changed for a row that is a number, by dotted path."""
    changes = row.trials[0].changes
    return {
        path: float(value)
        for path, value in changes.items()
        if path != "seed" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def best_trial(row: Row, *, mode: str) -> Trial:
    """The seed that did best by the metric, in one row."""
    pick = max if mode == "max" else min
    return row.trials[row.values.index(pick(row.values))]


def _label(trial: Trial) -> str:
    if trial.run.is_control:
        return f"no distillation (control) {_setting(trial)}".strip()
    return described({path: value for path, value in trial.changes.items() if path != "seed"})


def _setting(trial: Trial) -> str:
    changes = trial.changes.items()
    beside = {p: v for p, v in changes if p not in ("seed", VARIANT)}
    return _words({p: v for p, v in beside.items() if not p.startswith("losses.")})


def described(changes: Mapping[str, Any]) -> str:
    """A trial's changes in words: the variant, then each value after the shortest clear name."""
    variant = str(changes.get(VARIANT, ""))
    return (
        f"{variant} {_words({p: v for p, v in changes.items() if p != VARIANT})}".strip() or "base"
    )


def _words(changes: Mapping[str, Any]) -> str:
    words = [f"{_short(path, changes)}={_rounded(changes[path])}" for path in sorted(changes)]
    return " ".join(words)


def _rounded(value: Any) -> str:
    if isinstance(value, Mapping) and set(value) == {"steps"}:
        return "→".join(f"{_rounded(v)}@{epoch}" for epoch, v in value["steps"].items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _short(path: str, paths: Iterable[str]) -> str:
    """The last word of a path where that says which one is meant, else the whole path."""
    last = path.rpartition(".")[2]
    return path if [p.rpartition(".")[2] for p in paths].count(last) > 1 else last
