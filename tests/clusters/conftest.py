"""A real cluster of one node, started and ended by clusters/local/cluster.sh."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "clusters" / "local" / "cluster.sh"
PACKAGES = ("kdcore", "pipelines")


@dataclass(frozen=True)
class Cluster:
    """Where it listens, its token's file and what its nodes have installed."""

    folder: Path
    port: int
    dashboard_port: int
    image: Path

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def token(self) -> Path:
        return self.folder / "token"

    @property
    def pids(self) -> list[int]:
        return [int(line) for line in (self.folder / "pids").read_text().split()]

    def lose_package(self) -> None:
        """From now on the nodes' own `kdcore` and `pipelines` cannot be imported."""
        for name in PACKAGES:
            (self.image / name).unlink(missing_ok=True)
            (self.image / name).write_text("")
            (self.image / f"{name}.py").write_text("raise ImportError('not on this image')\n")

    def gain_package(self) -> None:
        for name in PACKAGES:
            (self.image / f"{name}.py").unlink(missing_ok=True)
            (self.image / name).unlink(missing_ok=True)
            (self.image / name).symlink_to(ROOT / name)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head with token authentication; its nodes' package is what `image` holds."""
    # Ray's sockets must have short names
    folder, image = (tmp_path_factory.mktemp(name) for name in ("ray", "image"))
    ports = free_ports(3)
    names = ("PORT", "DASHBOARD_PORT", "AGENT_PORT")
    here = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(image),
        "CPUS": "4",  # a count for Ray: what only waits keeps nothing from starting
        "PATIENCE_S": "400",
        **{name: str(port) for name, port in zip(names, ports, strict=True)},
    }
    environment = {**os.environ, **here}
    try:
        subprocess.run([SCRIPT, "start", folder, "0"], env=environment, check=True, timeout=500)
        yield Cluster(folder, ports[0], ports[1], image)
    finally:
        subprocess.run([SCRIPT, "stop", folder], env=environment, check=True, timeout=120)


def free_ports(count: int) -> list[int]:
    """Ports that nobody has, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture
def token(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, with its token in this process's environment."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(cluster.token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return cluster
