"""A sweep's table on the real CIFAR-10, with control, test split and paired tests, as Markdown.

Usage: python tests/benchmarks/sweep_table.py NAME, where ../shared/data is: kd2m_cpu or
kdiffusion_cpu. Runs the sweep of that name, or finds its runs finished, chooses of every loss or
variant the setting that is best on the validation split, evaluates the chosen students on the test
split and writes results/NAME.md beside this file.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipelines import jobs
from pipelines.loading import load
from pipelines.report import Row
from pipelines.significance import holm, paired_test
from pipelines.space import VARIANT, SweepConfig
from pipelines.sweep import Outcome, sweep
from pipelines.tracking import Tracker, commit
from pipelines.train import RESULT

CONFIGS = Path("pipelines/configs/sweeps")
RESULTS = Path(__file__).parent / "results"
LOSS = "losses.match.loss"
TITLES = {
    "kd2m_cpu": "KD2M's six rows on CIFAR-10, at the size of two cores",
    "kdiffusion_cpu": "KDiffusion and its comparators on CIFAR-10, at the size of two cores",
}


def watch(stage: str, done: int, total: int, note: str) -> None:
    print(f"{stage}: {done}/{total} {note}", flush=True)


def chosen(rows: Sequence[Row]) -> list[Row]:
    """The control, then of every variant or loss what was best on the validation split."""
    best: dict[str, Row] = {}
    for row in rows:  # the best first
        changes = row.trials[0].changes
        best.setdefault("" if row.is_control else changes.get(VARIANT, changes.get(LOSS)), row)
    return [best.pop(""), *best.values()]


def on_test(row: Row) -> list[float]:
    """Test accuracy per seed, in the order of seeds."""
    values = {}
    for trial in row.trials:
        done = jobs.finished(trial.run)
        assert done is not None
        network = jobs.trained_student(trial.run, done)
        values[trial.run.seed] = jobs.tested(trial.run, network)["test/top1"]
    return [values[seed] for seed in sorted(values)]


def spread(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f}"


def table(outcome: Outcome) -> str:
    rows = chosen(outcome.rows)
    tests = [on_test(row) for row in rows]
    p_values = [paired_test(values, tests[0]) for values in tests[1:]]
    corrected = holm(p_values)
    lines = [
        "| | validation | test | test - control | p | p, Holm |",
        "|---|---:|---:|---:|---:|---:|",
        f"| {rows[0].label} | {spread(rows[0].values)} | {spread(tests[0])} | | | |",
    ]
    for row, values, p, held in zip(rows[1:], tests[1:], p_values, corrected, strict=True):
        gain = 100 * (statistics.fmean(values) - statistics.fmean(tests[0]))
        cells = (row.label, spread(row.values), spread(values), f"{gain:+.2f}")
        lines.append(f"| {' | '.join(cells)} | {p:.3f} | {held:.3f} |")
    better = [row.label for row, p in zip(rows[1:], corrected, strict=True) if p < 0.05]
    verdict = "Rows that differ from the control at 0.05 after Holm: "
    return "\n".join([*lines, "", verdict + (", ".join(better) or "none") + "."])


def every_setting(rows: Sequence[Row]) -> str:
    lines = ["| | validation |", "|---|---:|"]
    lines += [f"| {row.label} | {spread(row.values)} |" for row in rows]
    return "\n".join(lines)


def training_seconds(rows: Sequence[Row]) -> float:
    """Summed over all students, of which as many run at once as there are cores."""
    folders = {trial.run.folder for row in rows for trial in row.trials}
    histories = [json.loads((folder / RESULT).read_text())["history"] for folder in folders]
    return sum(epoch["seconds"] for history in histories for epoch in history)


def main(name: str) -> None:
    config = load(CONFIGS / f"{name}.yaml")
    assert isinstance(config, SweepConfig)
    made_at = commit().get("mlflow.source.git.commit", "unknown")
    started = time.monotonic()
    outcome = sweep(config, watch=watch, tracker=Tracker(), verbose=False)
    minutes = (time.monotonic() - started) / 60
    base, trained = config.base, training_seconds(outcome.rows) / 60
    seeds = len(outcome.rows[0].values)
    (teacher,) = outcome.teachers
    RESULTS.mkdir(exist_ok=True)
    result = RESULTS / f"{name}.md"
    result.write_text(
        f"""# {TITLES[name]}

`python {Path(__file__).relative_to(Path.cwd())} {name}` at commit {made_at[:7]}:
{minutes:.0f} minutes on {os.cpu_count()} cores, {trained:.0f} minutes of training in all.
{base.data.limit} pictures, of which {base.data.validation:.0%} for validation,
{base.epochs} epochs, {seeds} seeds; {base.student.name} from {" ".join(base.teachers)} (test
{100 * teacher.metrics["test/top1"]:.2f}). Accuracy in percent, mean and standard deviation over
seeds, of the epoch that was best on validation. The control has the same schedule and, seed by
seed, the same initial weights and order of pictures; p is of the paired t-test on the test split.

{table(outcome)}

Every setting, on the validation split by which the rows above were chosen (so that theirs are
optimistic):

{every_setting(outcome.rows)}
"""
    )
    print(result.read_text())


if __name__ == "__main__":
    main(sys.argv[1])
