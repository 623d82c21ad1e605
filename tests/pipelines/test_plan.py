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
from pipelines.loop import Metrics
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
    monkeypatch.setattr(plan, "_step_seconds", lambda *base: 0.5)
    return workdir


def sweep_of(**changes: Any) -> SweepConfig:
    return validated(SweepConfig, {**deepcopy(SWEEP), **changes}, where="toy")


def test_a_plan_counts_trials_and_hours() -> None:
    config = sweep_of()
    planned = plan.planned(config, checked(config.base))
    assert (planned.count, planned.finished) == (6, 0)
    assert planned.trials == points(config)
    # 80 pictures in batches of 16, 3 epochs, 6 trials, half a second a step
    assert planned.hours == pytest.approx(5 * 3 * 6 * 0.5 / 3600)
    assert (planned.cache_bytes, planned.cache_rows) == (0, 100 + 2 * 80)  # the base is untaught


def test_a_plan_knows_what_is_finished() -> None:
    config = sweep_of()
    pictures = checked(config.base)

    def no_word(metrics: Metrics) -> None:
        pass

    train_here(config.run(points(config)[0]), Inputs(pictures), no_word)
    planned = plan.planned(config, pictures)
    assert (planned.count, planned.finished) == (6, 1)
    assert planned.hours == pytest.approx(5 * 3 * 5 * 0.5 / 3600)


def test_a_plan_weighs_the_cache_of_the_base() -> None:
    base = deepcopy(BASE)
    base["losses"]["mid"]["weight"] = 1
    config = sweep_of(base=base)
    planned = plan.planned(config, checked(config.base))
    # ten logits, an embedding of 8 and a map of 4 x 4 x 4, two bytes each
    assert planned.cache_bytes == (100 + 2 * 80) * 2 * (10 + 8 + 4 * 4 * 4)


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
