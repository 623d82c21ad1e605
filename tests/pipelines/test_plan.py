"""What ``kd sweep --dry-run`` says."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipelines import cli, plan
from pipelines.build import checked
from pipelines.config import RunConfig
from pipelines.data import Reader
from pipelines.loop import Metrics
from pipelines.plan import step_seconds
from pipelines.space import SweepConfig, points
from pipelines.strict import validated
from pipelines.train import Inputs, train_here

NETWORK = {"name": "convnet", "params": {"width": 2}}
BASE: dict[str, Any] = {
    "student": NETWORK,
    "data": {"name": "digits", "limit": 100, "validation": 0.2, "views": 2},
    "epochs": 3,
    "batch_size": 16,
    "losses": {"ce": {}, "mid": {"loss": "mse", "weight": 0, "layers": {"block2": "block2"}}},
}
BASE["teacher"] = {"run": {**BASE, "losses": {"ce": {}}}}
SWEEP: dict[str, Any] = {
    "base": BASE,
    "space": {"losses.mid.weight": {"grid": [0, 1, 2]}},
    "seeds": 2,
}


@pytest.fixture(autouse=True)
def folder(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where every step takes half a second, but in the test of how steps are timed."""
    monkeypatch.setattr(plan, "step_seconds", lambda *base: 0.5)
    return workdir


def test_the_fastest_of_three_steps_counts() -> None:
    taught = {"ce": {}, "kd": {"weight": 2}}
    run = validated(RunConfig, {**BASE, "losses": taught}, where="toy")
    pictures = checked(run)
    ticks = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])  # three steps of 3, 1 and 2 seconds
    assert step_seconds(run, pictures, Reader(run, pictures), clock=lambda: next(ticks)) == 1.0


def sweep_of(**changes: Any) -> SweepConfig:
    return validated(SweepConfig, {**deepcopy(SWEEP), **changes}, where="toy")


def test_a_plan_counts_trials_and_hours() -> None:
    config = sweep_of()
    planned = plan.planned(config, checked(config.base))
    assert (planned.count, planned.finished) == (6, 0)
    assert planned.trials == points(config)
    # 80 pictures in batches of 16, 3 epochs, 6 trials, half a second a step
    assert planned.hours == pytest.approx(5 * 3 * 6 * 0.5 / 3600)
    # the base is untaught, its neighbours hear ten logits, an embedding of 8 and a map of 4 x 4 x 4
    assert planned.cache_rows == 100 + 2 * 80
    assert planned.cache_bytes == (100 + 2 * 80) * 2 * (10 + 8 + 4 * 4 * 4)


def test_a_plan_knows_what_is_finished() -> None:
    config = sweep_of()
    pictures = checked(config.base)

    def no_word(metrics: Metrics) -> None:
        pass

    train_here(config.run(points(config)[0]), Inputs(pictures), no_word)
    planned = plan.planned(config, pictures)
    assert (planned.count, planned.finished) == (6, 1)
    assert planned.hours == pytest.approx(5 * 3 * 5 * 0.5 / 3600)


def test_a_plan_weighs_logits_in_their_format() -> None:
    base = deepcopy(BASE)
    base["teacher"]["logits"] = "uint8"
    planned = plan.planned(sweep_of(base=base), checked(sweep_of(base=base).base))
    # eight bits each, and the least and the greatest in sixteen
    assert planned.cache_bytes == (100 + 2 * 80) * (10 + 2 * 2 + 2 * (8 + 4 * 4 * 4))


def test_every_data_set_of_a_sweep_has_a_cache_of_its_own() -> None:
    config = sweep_of(space={**SWEEP["space"], "data.views": {"grid": [0, 2]}})
    planned = plan.planned(config, checked(config.base))
    assert planned.cache_rows == 100 + (100 + 2 * 80)


def test_a_trial_without_a_cached_teacher_needs_no_cache() -> None:
    config = sweep_of(space={})
    assert plan.planned(config, checked(config.base)).cache_bytes == 0


def test_a_search_that_learns_has_a_number_of_trials_only() -> None:
    search = {"algorithm": "optuna", "num_samples": 7}
    config = sweep_of(search=search)
    planned = plan.planned(config, checked(config.base))
    assert (planned.trials, planned.count) == ([], 14)


def test_a_dry_run_does_nothing(folder: Path) -> None:
    (folder / "toy.yaml").write_text(yaml.safe_dump(SWEEP))
    shown = CliRunner().invoke(cli.app, ["sweep", "toy.yaml", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "6 trials, 0 of them finished" in shown.output
    assert "    1 losses.mid.weight=0 seed=0" in shown.output
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a sweep's file, or the name of one by --resume"),
        (["toy.yaml", "--resume", "toy"], "expected a sweep's file, or the name"),
        (["--resume", "toy", "--set", "seeds=3"], "leave --set out"),
        (["--resume", "toy"], "expected one sweep 'toy' in runs/sweeps, there are: none"),
    ],
)
def test_a_sweep_is_named_once(words: list[str], message: str) -> None:
    shown = CliRunner().invoke(cli.app, ["sweep", *words])
    assert shown.exit_code == 2
    assert message in shown.output.replace("\n", " ")
