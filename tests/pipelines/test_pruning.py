"""Which configurations of a sweep are stopped early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from pipelines.pruning import PruneConfigurations

STOP = TrialScheduler.STOP


@dataclass
class FakeTrial:
    """What the scheduler reads of Tune's trial."""

    config: dict[str, Any]

    @property
    def trial_id(self) -> str:
        return f"{self.config['name']}-{self.config['seed']}"


def scheduler_of(rule: Any, *, mode: str = "max", epochs: int = 20) -> PruneConfigurations:
    return PruneConfigurations(
        rule,
        metric="val/top1",
        mode=mode,
        epochs=epochs,
        configuration_of=lambda config: config["name"],
    )


def stopped(
    scheduler: PruneConfigurations, name: str, value: float, *, epoch: int = 1, seed: int = 0
) -> bool:
    trial = FakeTrial({"name": name, "seed": seed})
    decision = scheduler.on_trial_result(None, trial, {"epoch": epoch, "val/top1": value})
    return decision == STOP


def test_asha_keeps_the_best_quarter_at_a_rung() -> None:
    scheduler = scheduler_of("asha")
    values = [0.5, 0.6, 0.4, 0.7, 0.65, 0.3, 0.8, 0.75]
    fates = [stopped(scheduler, f"c{i}", value) for i, value in enumerate(values)]
    # of n so far the best n // 4, and always the best: 0.75 is among the best two of eight
    assert fates == [False, False, True, False, True, True, False, False]


def test_asha_compares_at_its_rungs_only() -> None:
    scheduler = scheduler_of("asha")
    for epoch in range(1, 20):
        assert not stopped(scheduler, "good", 0.9, epoch=epoch)
    fates = {epoch: stopped(scheduler, f"at {epoch}", 0.1, epoch=epoch) for epoch in range(1, 20)}
    assert [epoch for epoch, fate in fates.items() if fate] == [1, 4, 16]


def test_a_configuration_is_judged_by_the_mean_over_its_seeds() -> None:
    scheduler = scheduler_of("asha")
    assert not stopped(scheduler, "steady", 0.6, seed=0)
    assert not stopped(scheduler, "steady", 0.6, seed=1)
    assert not stopped(scheduler, "lucky", 0.8, seed=0)
    assert stopped(scheduler, "lucky", 0.1, seed=1)  # the mean is 0.45
    # with all of its seeds: those that run, at whatever epoch, and those that come later
    assert stopped(scheduler, "lucky", 0.9, epoch=3, seed=0)
    assert stopped(scheduler, "lucky", 0.99, seed=2)
    assert not stopped(scheduler, "steady", 0.6, epoch=2)


def test_the_median_is_that_of_three_others_or_more() -> None:
    scheduler = scheduler_of("median")
    assert not any(stopped(scheduler, f"c{i}", value) for i, value in enumerate((0.2, 0.5, 0.1)))
    assert stopped(scheduler, "below", 0.19)
    assert not stopped(scheduler, "above", 0.21)


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_a_lower_value_is_better_where_it_is_minimised(rule: str) -> None:
    scheduler = scheduler_of(rule, mode="min")
    for i, value in enumerate((0.1, 0.2, 0.3)):
        stopped(scheduler, f"c{i}", value)
    assert stopped(scheduler, "high", 0.9)
    assert not stopped(scheduler, "low", 0.05)


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_nobody_is_stopped_at_the_last_epoch(rule: str) -> None:
    scheduler = scheduler_of(rule, epochs=4)
    assert not any(stopped(scheduler, f"c{i}", 1 - i / 10, epoch=4) for i in range(8))


def test_a_trial_that_is_told_again_has_one_vote() -> None:
    scheduler = scheduler_of("asha")
    assert not stopped(scheduler, "good", 0.5, seed=0)
    for _ in range(5):
        assert not stopped(scheduler, "other", 0.9, seed=0)
    assert stopped(scheduler, "other", 0.0, seed=1)  # a mean of 0.45, not of 0.75
