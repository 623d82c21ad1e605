"""What a sweep leaves behind beside its runs: all that its report and its model card say."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.costs import Cost
from pipelines.digests import digest
from pipelines.figures import History
from pipelines.report import Row, swept_numbers
from pipelines.significance import holm, paired_test
from pipelines.space import SweepConfig, neighbours

OUTCOME = "ranking.json"
_RUN = "result.json"


@dataclass(frozen=True)
class Ranked:
    """One configuration over its seeds."""

    label: str
    control: bool
    setting: str  # a control is compared with the rows of its own setting
    changes: Mapping[str, Any]  # of its first seed
    numbers: Mapping[str, float]  # those of the changes that are numbers
    seeds: Sequence[int]
    values: Sequence[float]  # a value for each seed
    runs: Sequence[str]  # folders
    cost: Cost  # of the student as it is used

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over seeds; NaN for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


@dataclass(frozen=True)
class RankedTeacher:
    """A teacher that the best student listened to."""

    title: str
    network: str
    weights: str
    cache: str  # fingerprint; empty for a live one
    metrics: Mapping[str, float]  # val/top1 where it was cached, test/top1
    cost: Cost


@dataclass(frozen=True)
class Unfinished:
    """A trial that is not ranked: it failed, or it was stopped early."""

    changes: Mapping[str, Any]
    error: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)  # the last that it reported


@dataclass(frozen=True)
class Chosen:
    """The student that was chosen on the validation split."""

    changes: Mapping[str, Any]
    weights: str
    run: Mapping[str, Any]  # its configuration


@dataclass(frozen=True)
class Provenance:
    """How a ranking was made."""

    command: str
    commit: str
    data: str  # digest of the pictures
    caches: Sequence[str]  # fingerprints
    sweep: Mapping[str, Any]  # the configuration, with every default


@dataclass(frozen=True)
class Ranking:
    """A finished sweep, as ``ranking.json`` holds it."""

    name: str
    metric: str
    mode: str
    rows: Sequence[Ranked]  # the best mean first
    failed: Sequence[Unfinished]
    stopped: Sequence[Unfinished]
    teachers: Sequence[RankedTeacher]
    best: Chosen
    test: Mapping[str, float]  # of the chosen student only
    made: Provenance


@dataclass(frozen=True)
class Comparison:
    """A row against the control of its setting, over the seeds that both have."""

    difference: float
    p_value: float  # NaN where fewer than two seeds are shared, or all differ alike
    corrected: float  # by Holm's method, over all rows of the sweep


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


def as_ranked(row: Row, cost: Cost) -> Ranked:
    """A row of the table with what its report needs, seeds in order."""
    order = sorted(range(len(row.trials)), key=lambda place: row.trials[place].run.seed)
    trials = [row.trials[place] for place in order]
    seeds = f" ({len(trials)} of {len(trials) + row.lacking} seeds)" if row.lacking else ""
    return Ranked(
        label=row.label + seeds,
        control=row.is_control,
        setting=row.setting,
        changes=trials[0].changes,
        numbers=swept_numbers(row),
        seeds=[trial.run.seed for trial in trials],
        values=[row.values[place] for place in order],
        runs=[str(trial.run.folder) for trial in trials],
        cost=cost,
    )


def write_ranking(ranking: Ranking, folder: Path) -> Path:
    """Write ``ranking.json`` into a folder, at once."""
    folder.mkdir(parents=True, exist_ok=True)
    arriving = folder / f".{OUTCOME}"
    arriving.write_text(json.dumps(asdict(ranking), indent=1) + "\n")
    return arriving.replace(folder / OUTCOME)


def read_ranking(folder: Path) -> Ranking:
    """What ``write_ranking`` wrote; ValueError where there is nothing, or something older."""
    file = folder / OUTCOME
    if not file.is_file():
        raise ValueError(f"this sweep has not been run: no {file}; run `kd sweep` first")
    held = json.loads(file.read_text())
    try:
        return Ranking(
            **held
            | {
                "rows": [Ranked(**row | {"cost": Cost(**row["cost"])}) for row in held["rows"]],
                "teachers": [
                    RankedTeacher(**one | {"cost": Cost(**one["cost"])}) for one in held["teachers"]
                ],
                "failed": [Unfinished(**one) for one in held["failed"]],
                "stopped": [Unfinished(**one) for one in held["stopped"]],
                "best": Chosen(**held["best"]),
                "made": Provenance(**held["made"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is of another version ({error}); run `kd sweep` again, which trains nothing"
        ) from None


def histories(row: Ranked, folder: Path) -> list[History]:
    """What each run of a row measured, epoch by epoch; ``folder`` is the sweep's.

    Runs lie where the sweep's folder does, from wherever the two are read.
    """
    files = [folder.parents[1] / Path(run).name / _RUN for run in row.runs]
    return [json.loads(file.read_text())["history"] for file in files if file.is_file()]


def control_of(row: Ranked, rows: Sequence[Ranked]) -> Ranked | None:
    """The control that a row is compared with, if there is one and it is not the row.

    It is the one of the row's setting, else the one for which nothing was set: a setting may be
    what the control goes without, such as a number of branches.
    """
    controls = {other.setting: other for other in rows if other.control}
    return None if row.control else controls.get(row.setting, controls.get(""))


def compared(rows: Sequence[Ranked]) -> list[Comparison | None]:
    """Every row against its control by a paired test over seeds; None where there is no control."""
    pairs = [_paired(row, control_of(row, rows)) for row in rows]
    p_values = [paired_test(*pair) if pair else math.nan for pair in pairs]
    corrected = holm(p_values)
    return [
        Comparison(statistics.fmean(pair[0]) - statistics.fmean(pair[1]), p_value, adjusted)
        if pair
        else None
        for pair, p_value, adjusted in zip(pairs, p_values, corrected, strict=True)
    ]


def _paired(row: Ranked, control: Ranked | None) -> tuple[list[float], list[float]] | None:
    """The values of both for the seeds that both have, in the same order."""
    if control is None:
        return None
    own, other = (dict(zip(held.seeds, held.values, strict=True)) for held in (row, control))
    shared = [seed for seed in own if seed in other]
    return ([own[s] for s in shared], [other[s] for s in shared]) if shared else None
