"""Optuna's proposals for a sweep with seeds and variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from pipelines.searchers import ProposeByOptuna, proposals_in
from pipelines.space import SweepConfig
from pipelines.strict import validated

TOY: dict[str, Any] = {
    "student": {"name": "convnet", "params": {"width": 2}},
    "teacher": {"name": "resnet8", "weights": "teacher.safetensors"},
    "data": {"name": "digits"},
    "epochs": 2,
    "losses": {"ce": {}, "it": {"loss": "kd"}},
}
SPACE: dict[str, Any] = {
    "optimizer.lr": {"loguniform": [0.001, 1.0]},
    "losses.it.weight": {"uniform": [0.0, 10.0]},
    "batch_size": {"choice": [16, 32, 64]},
    "data.validation": {"quniform": [0.1, 0.5, 0.1]},
    "epochs": {"randint": [1, 4]},
}
VARIANTS: dict[str, Any] = {
    "kd": {"losses.it.params.temperature": {"uniform": [1.0, 8.0]}},
    "dkd": {"losses.it.loss": "dkd", "losses.it.params.temperature": {"uniform": [2.0, 4.0]}},
}


def sweep_of(**content: Any) -> SweepConfig:
    search = {"algorithm": "optuna", "num_samples": content.pop("num_samples", 12)}
    content = {"base": TOY, "space": SPACE, "seeds": 2, "search": search, **content}
    return validated(SweepConfig, content, where="toy")


def searcher_of(config: SweepConfig, told: Any = (), record: Any = None) -> ProposeByOptuna:
    return ProposeByOptuna(config, told=told, record=record or (lambda params: None))


def run_through(searcher: ProposeByOptuna, value: Any) -> list[dict[str, Any]]:
    """Every proposal in turn, each answered by ``value(point)``; None fails."""
    points: list[dict[str, Any]] = []
    while (given := searcher.suggest(str(len(points)))) != Searcher.FINISHED:
        assert given is not None
        points.append(given["point"])
        answer = value(points[-1])
        result = None if answer is None else {"val/top1": answer}
        searcher.on_trial_complete(str(len(points) - 1), result, error=answer is None)
    return points


def test_every_proposal_is_a_run_and_comes_with_all_seeds() -> None:
    config = sweep_of(variants=VARIANTS)
    points = run_through(searcher_of(config), lambda point: 0.5)
    assert len(points) == 24
    for first, second in zip(points[::2], points[1::2], strict=True):
        assert {**first, "seed": 1} == second
        assert first["seed"] == 0
        config.run(first)
        low, high = {"kd": (1, 8), "dkd": (2, 4)}[first["variant"]]
        assert low <= first["losses.it.params.temperature"] <= high


def test_optuna_learns_from_the_mean_over_seeds() -> None:
    space = {"losses.it.weight": SPACE["losses.it.weight"]}
    config = sweep_of(space=space, num_samples=40)

    def value(point: dict[str, Any]) -> float:
        # the seeds differ more than the configurations, and cancel
        noise = 100.0 if point["seed"] else -100.0
        return noise - (point["losses.it.weight"] - 7) ** 2

    points = run_through(searcher_of(config), value)
    late = [point["losses.it.weight"] for point in points[-20:]]
    assert sum(abs(weight - 7) < 2 for weight in late) > 14


def test_a_failed_seed_fails_the_configuration_and_the_search_goes_on() -> None:
    points = run_through(searcher_of(sweep_of()), lambda p: None if p["seed"] else 0.5)
    assert len(points) == 24


def test_a_search_that_is_called_again_proposes_the_same_first() -> None:
    config, recorded = sweep_of(variants=VARIANTS), []
    searcher = searcher_of(config, record=recorded.append)
    first = [searcher.suggest(str(number)) for number in range(8)]  # four configurations, cut off
    assert len(recorded) == 4
    more: list[Any] = []
    again = run_through(searcher_of(config, recorded, more.append), lambda point: 0.5)
    assert again[:8] == [given["point"] for given in first if given]
    assert len(again) == 24
    assert len(more) == 8  # only what is new is recorded
    assert not any(params in recorded for params in more)  # and nothing is drawn again


@pytest.mark.parametrize("kind", ["choice", "grid"])
def test_a_listed_value_may_be_a_mapping(kind: str) -> None:
    terms = [{"loss": "kd"}, {"loss": "dkd"}]
    config = sweep_of(space={"losses.it": {kind: terms}})
    points = run_through(searcher_of(config), lambda point: 0.5)
    assert {point["losses.it"]["loss"] for point in points} == {"kd", "dkd"}


def test_a_variant_s_own_range_may_widen_the_common_one() -> None:
    wider = {"batch_size": {"choice": [16, 32, 64, 128]}}
    config = sweep_of(space={"batch_size": {"choice": [16, 32]}}, variants={"a": {}, "b": wider})
    points = run_through(searcher_of(config), lambda point: 0.5)
    assert {point["batch_size"] for point in points if point["variant"] == "a"} <= {16, 32}


def test_optuna_is_told_the_best_epoch_of_each_seed() -> None:
    config = sweep_of(space={"losses.it.weight": SPACE["losses.it.weight"]}, num_samples=1)
    searcher = searcher_of(config)
    for trial, values in enumerate(([0.2, 0.9, 0.4], [0.1, 0.3, 0.5])):
        searcher.suggest(str(trial))
        for value in values:
            searcher.on_trial_result(str(trial), {"val/top1": value})
        searcher.on_trial_complete(str(trial), {"val/top1": values[-1]})
    assert searcher._study.best_value == pytest.approx((0.9 + 0.5) / 2)


def test_a_proposal_whose_writing_was_broken_off_counts_for_nothing(tmp_path: Path) -> None:
    file = tmp_path / "proposals.jsonl"
    assert proposals_in(file) == []
    file.write_text('{"lr": 0.1}\n{"lr": 0.2}\n{"lr"')
    assert proposals_in(file) == [{"lr": 0.1}, {"lr": 0.2}]
    with file.open("a") as proposals:
        proposals.write('{"lr": 0.3}\n')
    assert proposals_in(file)[2:] == [{"lr": 0.3}]
