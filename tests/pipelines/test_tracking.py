from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest
import torch

from kdcore.models import convnet
from pipelines.models import Served
from pipelines.tracking import (
    TrackedInput,
    Tracker,
    commit,
    comparison_address,
    dotted,
    without_password,
)

# The folder holds no project: what loads the model there has only what the model brought.
LOAD = """
import sys, numpy as np, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
np.save("logits.npy", model.predict(np.load("image.npy")))
assert not {"pipelines", "kdcore"} & set(sys.modules), "the model needed the project"
"""


@pytest.fixture
def tracker(workdir: Path) -> Tracker:
    return Tracker()


def test_a_run_keeps_every_parameter_metric_and_tag(tracker: Tracker) -> None:
    params = {"student": {"name": "convnet", "params": {}}, "seed": 3, "losses": {"kd": {"w": 0.5}}}
    parent = tracker.start("sweep", params={}, tags={})
    run = tracker.start("trial", params=params, tags={"kd.seed": "3"}, parent=parent)
    for epoch in (1, 2):
        run.log({"val/top1": 0.1 * epoch, "lr": 0.5}, epoch=epoch)
    run.end("FINISHED")
    held = tracker.client.get_run(run.run_id)
    assert held.data.params == {
        "student.name": "convnet",
        "student.params": "{}",
        "seed": "3",
        "losses.kd.w": "0.5",
    }
    assert held.data.tags["mlflow.parentRunId"] == parent.run_id
    assert held.data.tags["kd.seed"] == "3"
    assert held.info.status == "FINISHED"
    history = tracker.client.get_metric_history(run.run_id, "val/top1")
    assert [(point.step, point.value) for point in history] == [(1, 0.1), (2, 0.2)]


def test_more_parameters_than_mlflow_takes_at_once_are_all_kept(tracker: Tracker) -> None:
    params = {f"p{number}": number for number in range(230)}
    run = tracker.start("wide", params=params, tags={})
    held = tracker.client.get_run(run.run_id).data.params
    assert held == {name: str(value) for name, value in params.items()}


def test_the_store_is_a_file_of_the_working_directory(tracker: Tracker, workdir: Path) -> None:
    assert tracker.uri == f"sqlite:///{workdir}/mlruns.db"
    experiment = tracker.client.get_experiment(tracker.experiment_id)
    assert experiment.artifact_location == (workdir / "mlruns").as_uri()


def test_a_logged_student_loads_in_a_fresh_process_without_the_project(
    tracker: Tracker, workdir: Path
) -> None:
    served = Served(convnet(5, 3, width=4), mean=(0.4, 0.5, 0.6), std=(0.2,)).eval()
    image = np.random.default_rng(0).integers(0, 256, (7, 3, 8, 8), dtype=np.uint8)
    run = tracker.start("student", params={}, tags={})
    uri = run.log_student(served, image[:2])
    np.save(workdir / "image.npy", image)
    command = [sys.executable, "-W", "ignore", "-c", LOAD, tracker.uri, uri]
    done = subprocess.run(command, cwd=workdir, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = served(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(np.load(workdir / "logits.npy"), expected, rtol=1e-5, atol=1e-5)
    model = tracker.client.get_logged_model(uri.removeprefix("models:/"))
    assert model.source_run_id == run.run_id


def test_what_a_run_was_trained_on_is_logged_once(tracker: Tracker) -> None:
    run = tracker.start("trial", params={}, tags={})
    pictures = TrackedInput("digits", "d" * 64, "digits", "training")
    cache = TrackedInput("digits as teacher sees it", "cafe", "caches", "teacher cache")
    for _ in range(2):
        run.log_inputs([pictures, cache])
    held = tracker.client.get_run(run.run_id).inputs.dataset_inputs
    found = {
        one.tags[0].value: (one.dataset.name, one.dataset.digest, json.loads(one.dataset.source))
        for one in held
    }
    assert len(held) == 2
    assert found == {
        "training": ("digits", "d" * 36, {"uri": "digits"}),
        "teacher cache": ("digits as teacher sees it", "cafe", {"uri": "caches"}),
    }


def test_the_ui_is_asked_for_the_trials_of_the_last_sweep(tracker: Tracker) -> None:
    server = "http://127.0.0.1:5000"
    assert comparison_address(tracker, server) == f"{server}/#/experiments/1"
    trials = {}
    for name in ("first", "second"):
        parent = tracker.start(name, params={}, tags={"kd.kind": "sweep"})
        runs = [tracker.start(f"{name}-{n}", params={}, tags={}, parent=parent) for n in (0, 1)]
        trials[name] = {run.run_id for run in runs}
    address, _, query = comparison_address(tracker, server).partition("?")
    assert address == f"{server}/#/compare-runs"
    asked = {name: json.loads(value) for name, (value,) in parse_qs(query).items()}
    assert set(asked["runs"]) == trials["second"]
    assert asked["experiments"] == ["1"]
    assert not {" ", '"'} & set(query)


def test_dotted_paths_name_every_leaf() -> None:
    content = {"a": {"b": 1, "c": {}}, "d": [1, 2]}
    assert dict(dotted(content)) == {"a.b": 1, "a.c": {}, "d": [1, 2]}
    assert dict(dotted({"teacher": [{"name": "a"}, {"name": "b"}]})) == {
        "teacher.0.name": "a",
        "teacher.1.name": "b",
    }


def test_a_folder_without_git_has_no_commit(workdir: Path) -> None:
    assert commit() == {}


def test_a_password_in_a_server_s_address_is_refused_without_its_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:5000")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD instead") as refused:
        Tracker()
    assert "hunter2" not in str(refused.value)


def test_a_database_s_password_is_not_shown() -> None:
    address = "postgresql://me:hunter2@127.0.0.1/kdsweep"
    assert without_password(address) == "postgresql://127.0.0.1/kdsweep"
    assert without_password("sqlite:////here/mlruns.db") == "sqlite:////here/mlruns.db"
