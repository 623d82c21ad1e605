"""What a stranger gets: no answer without the token, no address that was not told, no code run."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch

from pipelines.config import RunConfig
from pipelines.loading import load
from pipelines.loop import STATE
from pipelines.sources import read_pictures
from pipelines.train import Inputs, train_here
from tests.clusters.conftest import SCRIPT, Cluster

pytestmark = pytest.mark.timeout(600)
DRIVER = "import ray; ray.init(log_to_driver=False); print('nodes', len(ray.nodes()))"


def status(url: str, token: str | None) -> int:
    """The HTTP status of an answer to who shows this token."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=60
        ) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("path", ["/api/jobs/", "/api/v0/nodes", "/api/cluster_status"])
def test_the_dashboard_answers_the_token_s_owner_only(cluster: Cluster, path: str) -> None:
    url = cluster.dashboard + path
    assert status(url, None) == 401
    assert status(url, "0" * 64) == 403
    assert status(url, cluster.token.read_text()) == 200


def driver(cluster: Cluster, **variables: str) -> subprocess.CompletedProcess[str]:
    """A program that joins the cluster with these settings of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    address = {
        "RAY_ADDRESS": f"127.0.0.1:{cluster.port}",
        "RAY_gcs_rpc_server_connect_timeout_s": "20",
    }
    return subprocess.run(
        [sys.executable, "-c", DRIVER],
        env=kept | address | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_driver_joins_with_the_token_only(cluster: Cluster, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    owner = driver(cluster, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(cluster.token))
    assert owner.stdout.strip() == "nodes 1", owner.stderr[-500:]
    for stranger in (
        driver(cluster, RAY_AUTH_MODE="disabled"),
        driver(cluster, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(wrong)),
    ):
        assert stranger.returncode != 0
        assert "nodes" not in stranger.stdout


def test_the_token_is_its_owner_s_and_in_no_command_line_or_log(cluster: Cluster) -> None:
    token = cluster.token.read_text()
    assert cluster.token.stat().st_mode & 0o077 == 0
    for process in processes(cluster):
        assert token not in " ".join(process.cmdline())
    logs = [path for path in cluster.folder.rglob("*") if path.suffix in (".log", ".out", ".err")]
    assert logs
    for path in logs:
        assert token not in path.read_text(errors="replace"), path


def test_a_folder_that_others_may_write_in_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    done = subprocess.run([SCRIPT, "start", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "others may write in it" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_dashboard_listens_on_this_machine_only(cluster: Cluster) -> None:
    heard = {
        connection.laddr.port: connection.laddr.ip
        for process in processes(cluster)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert heard[cluster.dashboard_port] == "127.0.0.1"
    assert heard[cluster.port] == "::", "Ray's GCS can be bound now: say so in clusters/README.md"


def processes(cluster: Cluster) -> list[psutil.Process]:
    heads = [psutil.Process(pid) for pid in cluster.pids]
    return [one for head in heads for one in [head, *head.children(recursive=True)]]


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.sprung),)


def test_a_checkpoint_with_code_is_refused_and_not_executed(toy_run: Path, workdir: Path) -> None:
    run = load(toy_run, ["teacher=null", "losses={ce: {}}"])
    assert isinstance(run, RunConfig)
    sprung = workdir / "sprung"
    run.folder.mkdir(parents=True)
    torch.save({"step": {}, "more": Trap(sprung)}, run.folder / STATE)
    with pytest.raises(ValueError, match=r"^checkpoint \S+state\.pt cannot be read as tensors and"):
        train_here(run, Inputs(read_pictures(run.data, "train")), lambda metrics: None)
    assert not sprung.exists()


@pytest.mark.parametrize(
    "text",
    [
        "student: !!python/object/apply:os.mkdir [sprung]",
        "student: {name: !!python/name:os.mkdir }",
        "losses: {ce: {loss: 'os:mkdir'}}",
        "losses: {ce: {loss: 'os.mkdir'}}",
    ],
)
def test_a_configuration_with_code_is_refused_and_not_executed(text: str, workdir: Path) -> None:
    path = workdir / "run.yaml"
    path.write_text(f"data: {{name: digits}}\nepochs: 1\n{text}\n")
    with pytest.raises(ValueError, match=r"run\.yaml"):
        load(path)
    assert not (workdir / "sprung").exists()
