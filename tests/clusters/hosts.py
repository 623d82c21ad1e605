"""Two hosts with addresses of their own, made of network namespaces, and a run across them.

Usage, within the first host: python -m tests.clusters.hosts FOLDER TO_LOSE. Trains on both hosts
and prints what it is told of each epoch; with ``lost`` it says ``cut`` at an epoch, and ``lost``
when Ray has given the second host up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.cluster import cluster
from pipelines.config import RunConfig
from pipelines.loop import Metrics
from pipelines.sources import read_pictures
from pipelines.strict import validated
from pipelines.train import Inputs, train_on_workers
from tests.clusters.disturbed import AT_EPOCH, RUN

INTERFACE, PORT = "eth0", 6379
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # seen by these two hosts only
CPUS = 2
RAY = Path(sys.executable).parent / "ray"
# who does not answer for some seconds is given up, not for half a minute
HASTE = {"period_ms": "1000", "timeout_ms": "3000", "failure_threshold": "4"}
POLL_S = 0.2


@dataclass(frozen=True)
class Host:
    """A network namespace and a folder of its own for Ray."""

    name: str
    address: str
    temporary: Path
    mounted: Path  # where that folder appears on both hosts

    def start(self, *words: object, **variables: str) -> subprocess.Popen[str]:
        """A process on this host."""
        here = f'mount --bind {self.temporary} {self.mounted} && exec "$@"'
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, "sh", "-c", here, "sh", *map(str, words)],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    def link(self, state: str) -> None:
        """``up`` or ``down``."""
        ip("-n", self.name, "link", "set", INTERFACE, state)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Joined by a cable; OSError or CalledProcessError where this user may not make them."""
    names = [f"kd-{os.getpid()}-{place}" for place in "ab"]
    hosts = []
    try:
        for name in names:
            ip("netns", "add", name)
        ends = [word for name in names for word in ("peer", "name", INTERFACE, "netns", name)]
        ip("link", "add", *ends[1:5], "type", "veth", *ends[5:])
        for name, address, other in zip(names, ADDRESSES, reversed(ADDRESSES), strict=True):
            temporary, mounted = folder / name, folder / "ray"
            temporary.mkdir()
            mounted.mkdir(exist_ok=True)
            host = Host(name, address, temporary, mounted)
            ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for link in ("lo", INTERFACE):
                ip("-n", name, "link", "set", link, "up")
            # a program asks for its own address by the way that it would take to the world
            ip("-n", name, "route", "add", "default", "via", other)
            hosts.append(host)
        yield hosts[0], hosts[1]
    finally:
        for name in names:
            _remove(name)


def _remove(name: str) -> None:
    """The namespace with all that runs in it."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for pid in listed.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_ray(host: Host, *, is_head: bool, token: str) -> subprocess.Popen[str]:
    """Ray on a host, until it is killed."""
    head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={host.mounted}"]
    role = head if is_head else [f"--address={ADDRESSES[0]}:{PORT}"]
    words = [f"--node-ip-address={host.address}", f"--num-cpus={CPUS}", "--block"]
    haste = {f"RAY_health_check_{name}": value for name, value in HASTE.items()}
    return host.start(RAY, "start", *role, *words, **settings(token), **haste)


def settings(token: str) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ADDRESS": f"{ADDRESSES[0]}:{PORT}",
        "GLOO_SOCKET_IFNAME": INTERFACE,  # by a host's name it would find another address
        "OMP_NUM_THREADS": "1",
    }


@ray.remote(num_cpus=CPUS - 1)
class Occupied:
    """Leaves its node one CPU: two workers must then be on two hosts."""

    def address(self) -> str:
        return ray.util.get_node_ip_address()


def occupied() -> list[ray.actor.ActorHandle]:
    actors = []
    for node in ray.nodes():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        actors.append(Occupied.options(scheduling_strategy=there).remote())
    found = ray.get([actor.address.remote() for actor in actors])
    assert sorted(found) == sorted(ADDRESSES), found
    return actors


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def say_when_lost() -> None:
    while alive() == len(ADDRESSES):
        time.sleep(POLL_S)
    print("lost", flush=True)


def main(folder: str, to_lose: str) -> None:
    Path(folder).mkdir(exist_ok=True)
    os.chdir(folder)
    run = validated(RunConfig, RUN, where="toy")
    with cluster():
        while alive() < len(ADDRESSES):
            time.sleep(POLL_S)
        kept = occupied()  # and stays so: the host that is left cannot train alone
        waiting = [to_lose] if to_lose == "lost" else []

        def told(metrics: Metrics) -> None:
            print(json.dumps(metrics), flush=True)
            if waiting and metrics["epoch"] == AT_EPOCH:
                waiting.clear()
                print("cut", flush=True)
                Thread(target=say_when_lost, daemon=True).start()

        inputs = Inputs(read_pictures(run.data, "train"))
        print(json.dumps(train_on_workers(run, inputs, told).history), flush=True)
        del kept


if __name__ == "__main__":
    main(*sys.argv[1:])
