"""Population-based training: who is replaced, by what, and that its winner is an ordinary run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.search import Searcher
from safetensors.torch import load_file

from pipelines import trial
from pipelines.config import RunConfig
from pipelines.digests import plain
from pipelines.loop import LAST, Metrics
from pipelines.populations import ProposeGenerations, _extended
from pipelines.ranges import Range
from pipelines.sources import read_pictures
from pipelines.space import SweepConfig, changed
from pipelines.strict import validated
from pipelines.train import Inputs, branch_off, finished, train_here
from tests.timeless import timeless

WEIGHT = "losses.ce.weight"
TOY: dict[str, Any] = {
    "student": {"name": "convnet", "params": {"width": 2}},
    "data": {"name": "digits", "limit": 200, "validation": 0.2},
    "epochs": 4,
    "batch_size": 32,
    "losses": {"ce": {}},
}
TAUGHT: dict[str, Any] = {
    **TOY,
    "teacher": {"name": "resnet8", "weights": "teacher.safetensors"},
    "losses": {"ce": {}, "kd": {}},
}
SEARCH: dict[str, Any] = {
    "algorithm": "random",
    "num_samples": 4,
    "scheduler": "pbt",
    "grace": 1,
}


def sweep_of(**content: Any) -> SweepConfig:
    search = SEARCH | content.pop("search", {})
    space = {WEIGHT: {"loguniform": [0.1, 10.0]}}
    content = {"base": TOY, "space": space, "search": search, **content}
    return validated(SweepConfig, content, where="toy")


def weight_of(point: dict[str, Any]) -> float:
    """The weight that a member has in its last generation so far."""
    weight = point[WEIGHT]
    return float(weight["steps"][max(weight["steps"])] if isinstance(weight, dict) else weight)


def run_through(
    config: SweepConfig, value: Callable[[dict[str, Any]], float | None]
) -> list[dict[str, Any]]:
    """Every trial in turn, each answered by ``value(its point)``; None fails."""
    searcher, given = ProposeGenerations(config), []
    while (proposal := searcher.suggest(str(len(given)))) != Searcher.FINISHED:
        assert proposal is not None
        given.append(proposal)
        answer = value(proposal["point"])
        result = None if answer is None else {"val/top1": answer}
        searcher.on_trial_complete(str(len(given) - 1), result, error=answer is None)
    return given


def train_population(config: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The real trials of a sweep, one after the other in this process; the runs in order."""
    inputs = Inputs(read_pictures(config.base.data, "train"))
    told: list[Metrics] = []
    monkeypatch.setattr(trial.ray, "get", lambda reference: reference)
    monkeypatch.setattr(trial.tune, "report", told.append)
    searcher, runs = ProposeGenerations(config), []
    while (proposal := searcher.suggest(str(len(runs)))) != Searcher.FINISHED:
        run = config.run(proposal["point"])
        references = {trial.inputs_key(run): inputs}
        trial.run_trial(proposal, sweep=config, folder=Path.cwd(), references=references, threads=1)
        assert told[-1]["epoch"] == proposal["until"]
        searcher.on_trial_complete(str(len(runs)), told[-1])
        runs.append(run)
    assert len(runs) == searcher.total
    return runs


def history_of(run: RunConfig) -> list[Metrics]:
    done = finished(run)
    assert done is not None
    return done.history


def test_a_member_with_a_schedule_is_trained_again_from_its_configuration_alone(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = train_population(sweep_of(), monkeypatch)
    last = runs[-4:]
    scheduled = [run for run in last if not isinstance(run.losses["ce"].weight, float)]
    assert scheduled, "nobody was replaced"
    for run in scheduled:
        content = plain(run) | {"runs": "elsewhere"}  # as a file has it
        alone = validated(RunConfig, content, where="alone")
        inputs = Inputs(read_pictures(run.data, "train"))
        again = train_here(alone, inputs, lambda metrics: None)
        assert [*map(timeless, again.history)] == [*map(timeless, history_of(run))]
        for name, held in load_file(run.folder / LAST).items():
            np.testing.assert_array_equal(load_file(again.folder / LAST)[name], held)


def test_a_new_member_does_not_train_again_what_its_parent_trained(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep_of(search={"grace": 3})  # two generations, of which the second is one epoch
    runs = train_population(config, monkeypatch)
    (child,) = set(map(str, (run.folder for run in runs[4:]))) - {str(r.folder) for r in runs[:4]}
    (run,) = (run for run in runs[4:] if str(run.folder) == child)
    seconds = [metrics["seconds"] for metrics in history_of(run)]
    before = [[held["seconds"] for held in history_of(other)[:3]] for other in runs[4:]]
    assert before.count(seconds[:3]) == 2, "no other run took the same time to a nanosecond"


def test_the_worst_quarter_follows_the_best_by_the_mean_over_seeds(workdir: Path) -> None:
    config = sweep_of(seeds=2, search={"num_samples": 8, "grace": 2})

    def value(point: dict[str, Any]) -> float:
        # the seeds differ more than the members, and cancel
        return weight_of(point) + (100.0 if point["seed"] else -100.0)

    given = run_through(config, value)
    assert len(given) == ProposeGenerations(config).total == 8 * 2 * 2
    assert [one["until"] for one in given] == [2] * 16 + [4] * 16
    first, second = (
        [one["point"][WEIGHT] for one in given[start : start + 16 : 2]] for start in (0, 16)
    )
    order = sorted(first)
    replaced = [member for member in range(8) if first[member] != second[member]]
    assert sorted(first[member] for member in replaced) == order[:2]
    assert all(second[member]["steps"][0] in order[-2:] for member in replaced)
    assert all(set(second[member]["steps"]) == {0, 2} for member in replaced)
    for one, other in zip(given[::2], given[1::2], strict=True):
        assert {**one["point"], "seed": 1} == other["point"]


def test_the_least_is_best_where_the_metric_says_so(workdir: Path) -> None:
    config = sweep_of(search={"metric": "val/nll"})
    searcher = ProposeGenerations(config)
    first = [searcher.suggest(str(member)) for member in range(4)]
    weights = [one["point"][WEIGHT] for one in first if one]
    for member, weight in enumerate(weights):
        searcher.on_trial_complete(str(member), {"val/nll": weight})
    second = [searcher.suggest(str(4 + member)) for member in range(4)]
    changed_one = [one["point"][WEIGHT] for one in second if one][int(np.argmax(weights))]
    assert changed_one["steps"][0] == min(weights)


def test_the_next_generation_waits_for_the_last_member(workdir: Path) -> None:
    searcher = ProposeGenerations(sweep_of())
    for member in range(4):
        searcher.suggest(str(member))
    for member in range(3):
        searcher.on_trial_complete(str(member), {"val/top1": 0.5})
        assert searcher.suggest("early") is None
    searcher.on_trial_complete("3", {"val/top1": 0.4})
    assert searcher.suggest("4") is not None


def test_who_failed_is_replaced_and_when_all_did_the_search_ends(workdir: Path) -> None:
    given = run_through(sweep_of(), lambda p: None if weight_of(p) < 1 else weight_of(p))
    first, second = ([one["point"][WEIGHT] for one in given[at : at + 4]] for at in (0, 4))
    assert min(first) < 1, "the seed of the search drew no weight that fails"
    for before, after in zip(first, second, strict=True):
        assert (before == after) or after["steps"][0] == max(first)
        assert before != after or before >= 1
    assert len(run_through(sweep_of(), lambda point: None)) == 4


def test_a_sweep_that_is_called_again_proposes_the_same(workdir: Path) -> None:
    config = sweep_of(search={"num_samples": 6})
    assert run_through(config, weight_of) == run_through(config, weight_of)
    other = sweep_of(search={"num_samples": 6, "seed": 1})
    assert run_through(config, weight_of) != run_through(other, weight_of)


def test_a_broken_off_population_goes_on_to_the_same_runs(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep_of()
    expected = train_population(config, monkeypatch)
    moved = config.model_copy(update={"base": changed(config.base, {"runs": "broken"})})
    trained, left = trial.train_here, iter(range(7))

    def break_off(*held: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        trained(*held)

    with monkeypatch.context() as patch:
        patch.setattr(trial, "train_here", break_off)
        with pytest.raises(KeyboardInterrupt):
            train_population(moved, monkeypatch)
    resumed = train_population(moved, monkeypatch)
    assert [run.identity for run in resumed] == [run.identity for run in expected]
    for one, other in zip(resumed[-4:], expected[-4:], strict=True):
        assert [*map(timeless, history_of(one))] == [*map(timeless, history_of(other))]


def test_a_parent_that_is_further_on_is_not_copied(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = train_population(sweep_of(), monkeypatch)[0]
    child = changed(parent, {WEIGHT: {"steps": {0: 1.0, 2: 3.0}}})
    branch_off(child, parent, epochs=2)
    assert not child.folder.exists()


def test_a_number_is_multiplied_or_drawn_again_within_its_range() -> None:
    values = Range(uniform=(1.0, 2.0))
    held = {"steps": {0: 1.5, 2: 1.1}}
    drawn = [_extended(held, 4, values, np.random.default_rng(seed)) for seed in range(400)]
    assert all(one["steps"] | {4: 0} == {0: 1.5, 2: 1.1, 4: 0} for one in drawn)
    new = np.array([one["steps"][4] for one in drawn])
    raised, lowered = np.isclose(new, 1.32), new == 1.0  # 1.2 times, and 0.8 times but for the end
    assert 0.3 < raised.mean() < 0.45
    assert 0.3 < lowered.mean() < 0.45
    rest = new[~raised & ~lowered]
    assert 0.15 < len(rest) / len(new) < 0.35
    assert rest.min() > 1
    assert rest.max() < 2
    assert held == {"steps": {0: 1.5, 2: 1.1}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"space": {"optimizer.lr": {"uniform": [0.1, 1]}}}, "weights and parameters of losses"),
        ({"space": {"batch_size": {"uniform": [8, 9]}}}, "weights and parameters of losses"),
        ({"space": {WEIGHT: {"choice": [1, 2]}}}, "multiplies numbers"),
        ({"space": {WEIGHT: {"uniform": [0, 2]}}}, "multiplies numbers"),
        ({"space": {}}, "changes `space`"),
        ({"search": {"algorithm": "optuna"}}, "draws its members"),
        ({"search": {"num_samples": 1}}, "draws its members"),
        ({"search": {"grace": 4}}, "after so many epochs"),
        ({"base": {**TOY, "workers": 2}}, "one worker per run"),
        ({"variants": {"a": {}}}, "no variants"),
    ],
)
def test_what_no_population_can_have_is_refused(content: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sweep_of(**content)


def test_a_loss_s_parameter_may_be_in_the_space_if_it_takes_a_schedule() -> None:
    space = {"losses.kd.params.temperature": {"uniform": [1, 8]}}
    sweep_of(base=TAUGHT, space=space)
