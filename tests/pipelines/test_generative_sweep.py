"""A sweep over graphical models: the ordinary machinery, judged by distances between samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.cli import check
from pipelines.console import print_plan
from pipelines.generative.sweep import sweep
from pipelines.loading import load
from pipelines.preview import plan_of
from pipelines.ranking import read_ranking
from pipelines.space import SweepConfig
from pipelines.standing import Standing
from pipelines.sweep import best_run
from pipelines.tracking import Tracker
from tests.pipelines.generative_toys import STUDENTS

SWEEP = {
    "base": STUDENTS["eruptions"],
    "variants": {
        "surrogate": {"distil.weight": {"grid": [0.1, 1]}},
        "local": {"mode": "local"},
        "scratch": {"mode": "scratch"},
    },
    "seeds": 2,
    "search": {"metric": "val/mmd"},
}


def watch(stage: str, done: int, total: int, note: str) -> None:
    pass


def swept(folder: Path, **changes: object) -> SweepConfig:
    (folder / "toy_sweep.yaml").write_text(yaml.safe_dump(SWEEP | changes))
    loaded = load(folder / "toy_sweep.yaml")
    assert isinstance(loaded, SweepConfig)
    return loaded


def show(standing: Standing) -> None:
    pass


@pytest.mark.usefixtures("local_ray")
def test_a_sweep_ranks_modes_and_weights_by_a_distance(workdir: Path) -> None:
    config = swept(workdir)
    tracker = Tracker()
    outcome = sweep(config, watch=watch, show=show, tracker=tracker, verbose=False)
    assert not outcome.failed
    assert [len(row.values) for row in outcome.rows] == [2, 2, 2, 2]
    means = [row.mean for row in outcome.rows]
    assert means == sorted(means), "of a distance the least is best"
    assert [row.is_control for row in outcome.rows].count(True) == 1
    assert {"test/data/emd", "test/teacher/emd", "test/floor/emd"} <= outcome.test.keys()
    assert best_run(config).folder.absolute() == outcome.student.folder.absolute()

    runs = tracker.client.search_runs([tracker.experiment_id])
    parent = next(run for run in runs if run.data.tags.get("kd.kind") == "sweep")
    key = "mlflow.parentRunId"
    trials = [run for run in runs if run.data.tags.get(key) == parent.info.run_id]
    assert len(trials) == 8
    assert all("samples/teacher/emd" in trial.data.metrics for trial in trials)
    logged = {file.path for file in tracker.client.list_artifacts(parent.info.run_id)}
    assert {"samples.png", "ranking.json", "report.html", "best.safetensors"} <= logged
    ranking = read_ranking(outcome.folder)
    assert [teacher.network for teacher in ranking.teachers] == ["helmholtz"]
    assert {row.cost.parameters for row in ranking.rows} == {54}  # Chen et al. 2023's width of 2

    before = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/state.pt")}
    again = sweep(config, watch=watch, show=show, tracker=tracker, verbose=False)
    assert [row.values for row in again.rows] == [row.values for row in outcome.rows]
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/state.pt")}


def test_a_sweep_is_checked_and_planned_without_training(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = swept(workdir)
    check(workdir / "toy_sweep.yaml")
    assert "surrogate: helmholtz, 54 parameters to generate with" in capsys.readouterr().out
    print_plan(plan_of(config))
    assert "8 trials, 0 of them finished" in capsys.readouterr().out
    assert not Path("runs").exists()
