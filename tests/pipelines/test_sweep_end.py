"""What a sweep leaves when its trials are done: its report, and a champion that MLflow loads."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import mlflow
import pytest
import yaml

from kdcore.models import convnet
from pipelines import sweep as sweeps
from pipelines.datasets import DataConfig
from pipelines.loading import load
from pipelines.page import write_report
from pipelines.ranking import read_ranking
from pipelines.report import Trial
from pipelines.sharing import inputs_key
from pipelines.sources import read_pictures
from pipelines.space import SweepConfig, points
from pipelines.sweep import best_run, sweep
from pipelines.tracking import Tracker
from pipelines.train import Inputs, train_here


def watch(stage: str, done: int, total: int, note: str) -> None:
    pass


def run_flat(config: SweepConfig, inputs: Mapping[str, Inputs], **tracked: object) -> list[Trial]:
    """The trials one after the other in this process, where Ray is not what is tested."""
    trials = []
    for point in points(config):
        run = config.run(point)
        done = train_here(run, inputs[inputs_key(run)], lambda metrics: None)
        trials.append(Trial(run, point, done.best, is_whole=True))
    return trials


def refuse(*exported: object) -> list[Path]:
    raise ValueError("left out of this test")


def test_a_sweep_ends_with_a_report_and_a_champion(
    workdir: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "run_trials", run_flat)
    monkeypatch.setattr(sweeps, "cluster", lambda **options: nullcontext())
    monkeypatch.setattr(sweeps, "exported", refuse)
    path = workdir / "toys.yaml"
    space = {"losses.distill.weight": {"grid": [0, 1]}, "student.params.width": {"grid": [2, 4]}}
    path.write_text(yaml.safe_dump({"base": str(toy_run), "space": space}))
    config = load(path, ["teacher.source=live", "epochs=1"])
    assert isinstance(config, SweepConfig)
    for command in ("kd sweep toys.yaml", "kd sweep again"):
        outcome = sweep(config, watch=watch, tracker=Tracker(), verbose=False, command=command)

    ranking = read_ranking(outcome.folder)
    assert best_run(config) == outcome.best.run
    assert {row.cost.parameters for row in ranking.rows} == {sizes(2), sizes(4)}
    assert [row.label for row in ranking.rows] == [row.label for row in outcome.rows]
    assert ranking.made.command == "kd sweep again"
    assert [teacher.network for teacher in ranking.teachers] == ["convnet"]
    page, *figures = write_report(outcome.folder)
    assert "kd sweep again" in page.read_text()
    drawn = {figure.name for figure in figures}
    assert drawn >= {"responses.png", "parallel.png", "costs.png", "curves.png"}

    client = Tracker().client
    (version,) = client.search_model_versions("name = 'toys'")
    (run,) = (run for run in client.search_runs(["1"]) if "kd.kind" in run.data.tags)
    assert version.run_id == run.info.run_id
    assert run.data.tags["kd.export"] == "left out of this test"
    assert version.description.startswith("# Best student of sweep toys")
    logged = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert logged >= {"report.html", "ranking.json", "model_card.md", *drawn}
    assert [held.tags[0].value for held in run.inputs.dataset_inputs] == ["training"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", Tracker().uri)
    tested = read_pictures(DataConfig(name="digits"), "test")
    predicted = mlflow.pyfunc.load_model("models:/toys@champion").predict(tested.image)
    right = (predicted.argmax(axis=1) == tested.label).mean()
    assert right == pytest.approx(outcome.test["test/top1"], abs=1e-6)


def sizes(width: int) -> int:
    """Parameters of the toy's network."""
    return sum(held.numel() for held in convnet(10, 1, width=width).parameters())
