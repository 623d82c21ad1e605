"""A submitted run is a local one: on a real cluster with token authentication."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.entities import Run
from ray.job_submission import JobStatus, JobSubmissionClient
from typer.testing import CliRunner, Result

from pipelines import jobs
from pipelines import submit as submitted
from pipelines.cli import app
from pipelines.config import RunConfig
from pipelines.loading import load
from pipelines.submit import PACKAGES
from pipelines.tracking import Tracker
from pipelines.train import RESULT
from tests.clusters.conftest import Cluster
from tests.timeless import timeless

pytestmark = pytest.mark.timeout(600)
# no cache: what is compared then needs no Ray on this side
LIVE = ["--set", "teacher.source=live"]


def kd(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def remote(workdir: Path) -> Path:
    """The folder of the job, apart from the one of this process, with a store of its own."""
    folder = workdir / "remote"
    folder.mkdir()
    shutil.copy(workdir / "mlruns.db", folder)
    return folder


def result_of(folder: Path, name: str) -> dict[str, Any]:
    (file,) = folder.glob(f"runs/{name}-*/{RESULT}")
    return dict(json.loads(file.read_text()))


def tracked(folder: Path) -> dict[str, Run]:
    tracker = Tracker(f"sqlite:///{folder / 'mlruns.db'}")
    return {run.info.run_name: run for run in tracker.client.search_runs([tracker.experiment_id])}


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("runs/*/*")}


def test_a_submitted_run_leaves_the_files_and_numbers_of_a_local_one(
    token: Cluster, toy_run: Path, workdir: Path, remote: Path
) -> None:
    token.lose_package()
    (remote / "pipelines.py").write_text("raise ImportError('run from the shared folder')\n")
    done = kd("submit", toy_run, *LIVE, "--address", token.dashboard, "--folder", remote)
    assert done.exit_code == 0, done.output
    assert "best epoch" in done.stdout, "the job's words did not arrive"
    assert "succeeded" in done.stdout

    run = load(toy_run, ["teacher.source=live"])
    assert isinstance(run, RunConfig)
    jobs.train(run, watch=lambda *_: None, tracker=Tracker())
    assert files_of(remote) == files_of(workdir)
    for name in ("toy", "toy_teacher"):
        there, here = result_of(remote, name), result_of(workdir, name)
        assert there["run"] == here["run"]
        assert [*map(timeless, there["history"])] == [*map(timeless, here["history"])]
    far, near = tracked(remote), tracked(workdir)
    assert far.keys() == near.keys()
    for name, other in near.items():
        assert far[name].info.status == "FINISHED"
        assert far[name].data.params == other.data.params
        assert timeless(far[name].data.metrics) == timeless(other.data.metrics)


def test_the_nodes_own_package_runs_where_it_is_installed(
    token: Cluster, toy_run: Path, remote: Path
) -> None:
    words = ("submit", toy_run, *LIVE, "--installed", "--folder", remote)
    token.lose_package()
    lacking = kd(*words, "--address", token.dashboard)
    assert lacking.exit_code == 1
    assert "not on this image" in lacking.stdout
    token.gain_package()
    assert kd(*words, "--address", token.dashboard).exit_code == 0
    assert result_of(remote, "toy")["best"]


def test_a_detached_job_is_asked_for_heard_and_stopped(
    token: Cluster, toy_run: Path, remote: Path
) -> None:
    at = ("--address", token.dashboard)
    endless = [*LIVE, "--set", "epochs=1000000"]
    started = kd("submit", toy_run, *endless, *at, "--folder", remote, "--detach")
    assert started.exit_code == 0, started.output
    job = started.stdout.split()[1]
    client = submitted.connected(token.dashboard)
    heard = await_words(client, job, "toy_teacher: 3/3")
    assert kd("submit", "--logs", job, *at).stdout.startswith(heard[:40])
    assert f"{job} toy running" in kd("submit", "--status", job, *at).stdout
    assert f"{job} toy stopped" in kd("submit", "--stop", job, *at).stdout


def await_words(client: JobSubmissionClient, job: str, words: str) -> str:
    """What the job has said once it says these words."""
    while words not in (heard := client.get_job_logs(job)):
        assert not client.get_job_status(job).is_terminal(), heard
    return heard


def test_who_is_attached_and_interrupts_stops_the_job(
    token: Cluster, toy_run: Path, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(words: str) -> None:
        if "stopping" not in words:
            raise KeyboardInterrupt

    run = load(toy_run, ["teacher.source=live", "epochs=1000000"])
    assert not hasattr(run, "space")
    client = submitted.connected(token.dashboard)
    job = submitted.submit(run, client, folder=remote, with_code=True)
    with pytest.raises(KeyboardInterrupt):
        submitted.follow(client, job, interrupt)
    assert client.get_job_status(job) == JobStatus.STOPPED


@pytest.mark.slow
def test_the_cluster_s_own_workers_write_the_cache(
    token: Cluster, toy_run: Path, remote: Path
) -> None:
    token.lose_package()
    done = kd("submit", toy_run, "--address", token.dashboard, "--folder", remote)
    assert done.exit_code == 0, done.output
    assert list(remote.glob("caches/*/logits/view=0002/*.parquet"))


class Noting:
    """A client that notes what it is given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.files: dict[str, str] = {}

    def submit_job(self, **given: Any) -> str:
        self.given = given
        folder = Path(given["runtime_env"]["working_dir"])
        self.files = {str(path.relative_to(folder)): "" for path in folder.rglob("*")}
        self.files["job.yaml"] = (folder / "job.yaml").read_text()
        return "job"


@pytest.fixture
def client() -> Noting:
    return Noting()


def test_the_job_gets_the_configuration_and_the_code_and_nothing_else(
    toy_run: Path, workdir: Path, client: Noting
) -> None:
    (workdir / "private.txt").write_text("mine")
    run = load(toy_run)
    submitted.submit(run, client, folder=Path("/shared/a b"), with_code=True)  # type: ignore[arg-type]
    assert {name.partition("/")[0] for name in client.files} == {*PACKAGES, "job.yaml"}
    assert not [name for name in client.files if "__pycache__" in name]
    assert RunConfig.model_validate(yaml.safe_load(client.files["job.yaml"])) == run
    assert "cd '/shared/a b' && exec python -P -m pipelines train" in client.given["entrypoint"]
    submitted.submit(run, client, folder=workdir, with_code=False)  # type: ignore[arg-type]
    assert set(client.files) == {"job.yaml"}


def test_a_sweep_is_sent_as_one(toy_run: Path, workdir: Path, client: Noting) -> None:
    path = workdir / "two.yaml"
    space = {"losses.distill.weight": {"grid": [0, 1.0e-5]}}
    path.write_text(yaml.safe_dump({"base": str(toy_run), "space": space}))
    submitted.submit(load(path), client, folder=workdir, with_code=False)  # type: ignore[arg-type]
    assert "pipelines sweep" in client.given["entrypoint"]
    (workdir / "sent.yaml").write_text(client.files["job.yaml"])
    assert load(workdir / "sent.yaml") == load(path)


def test_a_tracking_server_is_named_to_the_job_but_never_a_password(
    toy_run: Path, workdir: Path, client: Noting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    submitted.submit(load(toy_run), client, folder=workdir, with_code=False)  # type: ignore[arg-type]
    variables = client.given["runtime_env"]["env_vars"]
    assert variables["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@mlflow:5000")
    with pytest.raises(ValueError, match="holds a password") as refused:
        submitted.submit(load(toy_run), client, folder=workdir, with_code=False)  # type: ignore[arg-type]
    assert "hunter2" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2://me:hunter2@store/mlflow")
    with pytest.raises(ValueError, match=r"names postgresql\+psycopg2://, whose pass") as refused:
        submitted.submit(load(toy_run), client, folder=workdir, with_code=False)  # type: ignore[arg-type]
    assert "hunter2" not in str(refused.value)


def test_a_token_is_asked_for_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    result = kd("submit", "--status", "job")
    assert result.exit_code == 2
    assert "expected the cluster's token in RAY_AUTH_TOKEN or its file" in result.stderr


@pytest.mark.parametrize(
    "words", [[], ["run.yaml", "--status", "job"], ["--stop", "a", "--logs", "b"]]
)
def test_one_thing_is_asked_at_a_time(words: list[str]) -> None:
    result = kd("submit", *words)
    assert result.exit_code == 2
    assert "expected either a file or a job's id" in result.stderr
