"""What a person reads while commands work, and when they are done."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pipelines.standing import FINISHED, Standing

if TYPE_CHECKING:  # each of them takes seconds to import
    from pipelines.cache.inspection import CacheInfo
    from pipelines.plan import Plan
    from pipelines.report import Row
    from pipelines.runs import Run
    from pipelines.sweep import Outcome
    from pipelines.train import Finished

_TRIALS_SHOWN = 20  # at once, so that the table fits a screen
console = Console()
errors = Console(stderr=True)


class Bars:
    """Progress for people: on a terminal bars and the trials at work, else a line now and then.

    Whatever is told is drawn at once, by who tells it: no thread of its own reads what changes.
    """

    def __init__(self, on: Console = console) -> None:
        self._console = on
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=on,
        )
        self._tasks: dict[str, Any] = {}
        self._told: dict[str, int] = {}
        self._standing: Standing | None = None
        self._live = Live(get_renderable=self._drawn, console=on, auto_refresh=False)

    def __enter__(self) -> Bars:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        if not self._console.is_terminal:
            self._tell(stage, done, total, note)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, note="")
        self._progress.update(self._tasks[stage], completed=done, total=total, note=note)
        self._live.refresh()

    def show(self, standing: Standing) -> None:
        """Draw how far a sweep is."""
        if not self._console.is_terminal:
            if standing.done:
                self._tell("sweep", standing.done, standing.total, "trials, " + in_words(standing))
            return
        self._standing = standing
        self._live.refresh()

    def _drawn(self) -> Group:
        return Group(self._progress, *(_standing_view(self._standing) if self._standing else []))

    def _tell(self, stage: str, done: int, total: int, note: str) -> None:
        """A line for every tenth of the whole."""
        if done == total or 10 * done // total > self._told.get(stage, -1):
            self._told[stage] = 10 * done // total
            words = f"{stage}: {done}/{total} {note}"
            self._console.print(words, soft_wrap=True, markup=False, highlight=False)


def _standing_view(standing: Standing) -> list[Text | Table]:
    """How far the sweep is, and under it the trials at work while there are any."""
    words = Text(f"{standing.done} of {standing.total} trials, {in_words(standing)}")
    return [words, running_table(standing)] if standing.running else [words]


def running_table(standing: Standing) -> Table:
    """The trials at work, those that began first."""
    table = Table()
    for column in ("trial at work", "epoch", standing.metric, "seconds"):
        table.add_column(column, justify="left" if column == "trial at work" else "right")
    running = list(standing.running.values())
    for held in running[:_TRIALS_SHOWN]:
        value = "" if held.value is None else f"{held.value:.4f}"
        table.add_row(Text(held.label), f"{held.epoch}/{held.epochs}", value, f"{held.seconds:.0f}")
    if len(running) > _TRIALS_SHOWN:
        table.add_row(f"and {len(running) - _TRIALS_SHOWN} more")
    return table


def in_words(standing: Standing) -> str:
    """What runs and what came of the others, the best so far, and how long the rest may take."""
    words = [f"{len(standing.running)} running"]
    words += [f"{count} {state}" for state, count in standing.ended.items() if state != FINISHED]
    if standing.best is not None:
        value, label = standing.best
        words.append(f"best {standing.metric} {value:.4f} ({label})")
    if standing.seconds_left is not None and standing.done < standing.total:
        words.append(f"about {_duration(standing.seconds_left)} left")
    return ", ".join(words)


def _duration(seconds: float) -> str:
    """In the unit that a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def say(words: str, style: str | None = None) -> None:
    """One line as it is, neither wrapped nor coloured by what is in it."""
    console.print(words, style=style, soft_wrap=True, markup=False, highlight=False)


def print_cache(name: str, found: CacheInfo) -> None:
    """What a cache holds, and what in it is unfinished."""
    accuracy = "" if found.accuracy is None else f"teacher {found.accuracy:.2%} of all pictures"
    table = Table(title=f"cache {name} {accuracy}".strip())
    for heading in ("column", "views", "rows", "bytes", "bytes/row"):
        table.add_column(heading, justify="left" if heading == "column" else "right")
    for column in found.columns:
        counts = (column.views, column.rows, column.num_bytes)
        numbers = [*(f"{count:,}" for count in counts), f"{column.bytes_per_row:,.1f}"]
        table.add_row(column.folder, *numbers)
    console.print(table)
    for unfinished in found.unfinished:
        say(f"unfinished: {unfinished}")


def print_plan(plan: Plan) -> None:
    """The trials that a sweep would train, and what they would cost."""
    for place, point in enumerate(plan.trials, start=1):
        words = " ".join(f"{path}={value}" for path, value in point.items())
        say(f"{place:>5} {words or 'base'}")
    say(f"{plan.count} trials, {plan.finished} of them finished")
    if plan.cache_bytes:
        size = f"{plan.cache_bytes / 2**20:,.0f} MiB before compression"
        say(f"cache: {plan.cache_rows:,} rows of what the trials' teachers say, {size}")
    say(
        f"time: {1000 * plan.step_seconds:.0f} ms a step of the base, so {plan.hours:.2f} hours "
        f"for {plan.count - plan.finished} trials one after the other; cache, live teachers, "
        "validation, making synthetic pictures come on top"
    )


def print_trained(run: Run, result: Finished) -> None:
    """What one run came to."""
    metric, value = run.selects[0], result.best[run.selects[0]]
    shown = f"val top-1 {value:.2%}" if metric == "val/top1" else f"{metric} {value:.4f}"
    say(f"best epoch {result.best['epoch']:.0f}: {shown}")
    for name, held in result.best.items():
        if name.startswith("samples/"):
            say(f"  {name.removeprefix('samples/')} {held:.4g}")
    say(f"student: {result.weights}")


def print_outcome(name: str, metric: str, outcome: Outcome) -> None:
    """A sweep's ranked table, what failed, and where the rest of it is."""
    from pipelines.page import REPORT

    _print_table(name, metric, outcome)
    if outcome.stopped:
        say(f"stopped early, not ranked: {len(outcome.stopped)} trials")
    for trial in outcome.failed:
        say(f"failed: {dict(trial.changes)}: {trial.error}", style="red")
    _print_test(outcome)
    say(f"best student: {outcome.student.weights}")
    say(f"report: {outcome.folder / REPORT}")
    say(f"compare the runs: {_this_command()} ui")


def _print_test(outcome: Outcome) -> None:
    if not outcome.test:
        say("not tested: the data have no test part; name a dataset that has by `data.test`")
        return
    if "test/top1" not in outcome.test:
        shown = [f"{name.removeprefix('test/')} {held:.4g}" for name, held in outcome.test.items()]
        say(f"test data, seen once: {', '.join(shown)}")
        return
    tested = [f"{held.title} {held.metrics['test/top1']:.4f}" for held in outcome.teachers]
    shown = [f"student {outcome.test['test/top1']:.4f}", *tested]
    say(f"test top-1, seen once: {', '.join(shown)}")


def _print_table(name: str, metric: str, outcome: Outcome) -> None:
    table = Table(title=f"{name}: {metric} of the best epoch, mean and sd over seeds")
    for column in ("", "configuration", "mean", "sd", "seeds", "- control"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for place, numbers in enumerate(_rows(outcome.rows), start=1):
        table.add_row(str(place), *numbers)
    for teacher in outcome.teachers:
        if metric in teacher.metrics:
            value = f"{teacher.metrics[metric]:.4f}"
            table.add_row("", teacher.title, value, "", "1", "", style="bold")
    console.print(table)


def _rows(rows: Iterable[Row]) -> Iterable[tuple[str, ...]]:
    """Each row in words, with its distance to the control of its setting."""
    rows = list(rows)
    controls = {row.setting: row.mean for row in rows if row.is_control}
    for row in rows:
        control = None if row.is_control else controls.get(row.setting)
        gap = "" if control is None else f"{row.mean - control:+.4f}"
        spread = "" if math.isnan(row.deviation) else f"{row.deviation:.4f}"
        seeds = len(row.values)
        counted = f"{seeds} of {seeds + row.lacking}" if row.lacking else str(seeds)
        yield row.label, f"{row.mean:.4f}", spread, counted, gap


def _this_command() -> str:
    """How this program is called from where the user is."""
    kd = Path(sys.executable).parent / "kd"
    return str(kd.relative_to(Path.cwd())) if kd.is_relative_to(Path.cwd()) else str(kd)
