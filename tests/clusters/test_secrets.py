"""What is planted in the environment is nowhere in what a run, a sweep or a job leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipelines import submit as submitted
from pipelines.config import RunConfig
from pipelines.loading import load
from pipelines.ranking import OUTCOME
from tests.clusters.conftest import free_ports
from tests.clusters.test_submit import Noting

SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": "planted-password-41c7",
    "AWS_ACCESS_KEY_ID": "PLANTEDKEY9A3F",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-77b1",
    "AWS_SESSION_TOKEN": "planted-aws-session-20ce",
    "GOOGLE_APPLICATION_CREDENTIALS": "/planted/google-8d40.json",
    "RAY_AUTH_TOKEN": "c0ffee" + "5eed" * 12 + "0123456789",
}


def holders(folder: Path, told: str) -> list[str]:
    """Where a secret is found: which of them, in which file, or in what was said."""
    found = [f"{name} was said" for name, value in SECRETS.items() if value in told]
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found += [f"{name} in {path}" for name, v in SECRETS.items() if v.encode() in content]
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A tracking server that keeps what it is sent in the test's folder."""
    (port,) = free_ports(1)
    folder = tmp_path / "server"
    folder.mkdir()
    words = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", "sqlite:///mlruns.db", "--artifacts-destination", "artifacts"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words, *stores],
        cwd=folder,
        stdout=(folder / "out.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        answers = False
        while not answers:
            assert process.poll() is None, (folder / "out.log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                answers = True
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)  # between two questions
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait()


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its logs; its sockets must have short names."""
    folder = Path(tempfile.mkdtemp(prefix="kd-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_that_a_run_and_a_sweep_leave_holds_a_secret(
    toy_run: Path, tmp_path: Path, server: str, ray_folder: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    space = {"losses.distill.weight": {"grid": [0, 1]}}
    (work / "two.yaml").write_text(yaml.safe_dump({"base": str(toy_run), "space": space}))
    # a user's name is no secret: MLflow keeps it as the author of what was logged
    user = {"MLFLOW_TRACKING_URI": server, "MLFLOW_TRACKING_USERNAME": "me"}
    told = ""
    for words in (["train", str(toy_run)], ["sweep", "two.yaml"]):
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", *words, "--verbose"],
            cwd=work,
            env={**os.environ, **SECRETS, **user, "RAY_TMPDIR": str(ray_folder)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        told += done.stdout + done.stderr
    # what is searched is there: the runs, the report and the ranking, MLflow's store, Ray's logs
    names = {path.name for path in tmp_path.rglob("*")}
    assert {OUTCOME, "report.html", "result.json", "mlruns.db", "MLmodel"} <= names
    assert list(ray_folder.rglob("*.log"))
    assert holders(tmp_path, told) == []
    assert holders(ray_folder, "") == []


def test_no_secret_goes_with_a_job(
    toy_run: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SECRETS, "MLFLOW_TRACKING_URI": "http://mlflow:5000"}.items():
        monkeypatch.setenv(name, value)
    run, client = load(toy_run), Noting()
    assert isinstance(run, RunConfig)
    submitted.submit(run, client, folder=workdir, with_code=False)  # type: ignore[arg-type]
    assert holders(workdir, json.dumps(client.given) + client.files["job.yaml"]) == []
