"""What people see of a sweep at work: one table on a terminal, lines elsewhere."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from pipelines.console import Bars, in_words, running_table
from pipelines.standing import FAILED, FINISHED, STOPPED, Standing


def epoch(number: int, value: float, seconds: float = 10.0) -> dict[str, float]:
    return {"epoch": number, "val/top1": value, "seconds": seconds}


def begun(total: int = 8) -> Standing:
    """Two trials side by side, of which one is done: it took 40 seconds."""
    standing = Standing(total, at_once=2, metric="val/top1", mode="max")
    for trial in ("a", "b"):
        standing.begin(trial, f"weight={trial}", epochs=4)
    for number, value in enumerate([0.2, 0.7, 0.6, 0.5], start=1):
        standing.report("a", epoch(number, value))
    standing.end("a", FINISHED)
    standing.report("b", epoch(1, 0.3))
    return standing


def drawn(*standings: Standing, width: int = 120) -> tuple[str, str]:
    """All that a terminal is sent, and what stands on it in the end."""
    screen = StringIO()
    terminal = Console(file=screen, force_terminal=True, width=width, record=True)
    with Bars(terminal) as bars:
        for standing in standings:
            bars.show(standing)
    return screen.getvalue(), terminal.export_text()


def test_the_best_epoch_of_any_trial_is_the_best_so_far() -> None:
    standing = begun()
    assert standing.best == (0.7, "weight=a")
    least = Standing(2, at_once=1, metric="val/nll", mode="min")
    least.begin("a", "a", epochs=2)
    for number, value in ((1, 0.9), (2, 1.4)):
        least.report("a", {"epoch": number, "val/nll": value})
    assert least.best == (0.9, "a")


def test_the_time_left_is_that_of_a_mean_trial_for_each_that_is_not_done() -> None:
    # 7 of 8 are left at 40 s each, 10 s of one of them are spent, two run side by side
    assert begun().seconds_left == pytest.approx((7 * 40 - 10) / 2)
    assert Standing(8, at_once=2, metric="val/top1", mode="max").seconds_left is None


def test_an_epoch_that_is_told_again_counts_once() -> None:
    standing = begun()
    before = standing.seconds_left
    standing.report("b", epoch(1, 0.3))
    assert standing.seconds_left == before
    assert standing.running["b"].seconds == 10


def test_the_table_names_trials_states_the_best_and_the_time_left() -> None:
    standing = begun()
    for trial, state in (("c", STOPPED), ("d", FAILED)):
        standing.begin(trial, trial, epochs=4)
        standing.end(trial, state)
    words = "1 running, 1 stopped early, 1 failed, best val/top1 0.7000 (weight=a), about 28 s left"
    assert in_words(standing) == words
    _, screen = drawn(standing)
    assert f"3 of 8 trials, {words}" in " ".join(screen.split())
    assert re.search(r"weight=b\W+1/4\W+0\.3000\W+10", screen)


def test_a_terminal_has_one_table_that_is_drawn_anew() -> None:
    first, second = begun(), begun()
    second.report("b", epoch(2, 0.4))
    sent, _ = drawn(first, second)
    assert sent.count("trial at work") >= 2
    # the cursor goes up over the former table before each next one
    pieces = sent.split("trial at work")
    assert all("\x1b[1A" in piece for piece in pieces[1:-1])
    assert "2/4" in pieces[-1]


def test_without_a_terminal_every_tenth_of_the_trials_is_a_plain_line() -> None:
    page = StringIO()
    standing = Standing(40, at_once=1, metric="val/top1", mode="max")
    with Bars(Console(file=page, width=80)) as bars:
        for number in range(40):
            standing.begin(str(number), f"weight={number}", epochs=1)
            bars.show(standing)
            standing.report(str(number), epoch(1, number / 40))
            standing.end(str(number), FINISHED)
            bars.show(standing)
    lines = page.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("sweep: 1/40 trials, 0 running, best val/top1 0.0000 (weight=0)")
    assert lines[-1] == "sweep: 40/40 trials, 0 running, best val/top1 0.9750 (weight=39)"
    assert "\x1b" not in page.getvalue()


def test_a_label_is_words_and_no_markup_of_the_terminal_s() -> None:
    standing = Standing(1, at_once=1, metric="val/top1", mode="max")
    standing.begin("a", "layers=[bold]", epochs=1)
    standing.report("a", epoch(1, 0.5))
    assert re.search(r"layers=\[bold\]\W+1/1", drawn(standing)[1])
    page = StringIO()
    standing.end("a", FINISHED)
    Bars(Console(file=page)).show(standing)
    assert "(layers=[bold])" in page.getvalue()


def test_many_trials_at_once_do_not_fill_the_screen() -> None:
    standing = Standing(300, at_once=100, metric="val/top1", mode="max")
    for number in range(100):
        standing.begin(str(number), f"weight={number}", epochs=1)
    assert running_table(standing).row_count == 21
