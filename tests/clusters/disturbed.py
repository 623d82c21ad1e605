"""Trains on several raylets of one machine, in a process of its own, while somebody is killed.

Usage: python -m tests.clusters.disturbed FOLDER VICTIM, where VICTIM is ``nobody``, ``worker``,
``node``, ``spot`` (a node that was warned first), ``every_node`` (and one comes later) or ``head``;
``elastic`` of a run that goes on with fewer workers until there is a node again; or of a sweep
``no_trial`` or ``trial_node``. Prints what it is told of each epoch, and at the end what came of
it. Wants RAY_AUTH_TOKEN: Ray's processes ask for one, and Ray keeps the first that it finds when it
is imported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from time import time_ns
from typing import Any
from unittest.mock import patch

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from kdcore.rows import num_workers
from pipelines.cluster import SPARE_CPUS, cluster
from pipelines.config import RunConfig
from pipelines.loop import Metrics, Progress, Report
from pipelines.sources import read_pictures
from pipelines.space import SweepConfig
from pipelines.standing import Standing
from pipelines.strict import validated
from pipelines.sweep import sweep
from pipelines.tracking import Tracker
from pipelines.train import MAX_FAILURES, Inputs, train_on_workers

WORKERS, EPOCHS, AT_EPOCH = 2, 16, 3
FEWER_UNTIL = 6  # the epoch after which the elastic run waits for its workers
NODES = 2  # beside the head's, which runs none; each can hold all workers
WARNED_S = 30  # before a spot instance is taken back
RUN: dict[str, Any] = {
    "student": {"name": "convnet", "params": {"width": 4}},
    "data": {"name": "digits", "limit": 400, "validation": 0.2},
    "epochs": EPOCHS,
    "batch_size": 32,
    "optimizer": {"lr": 0.05},
    "losses": {"ce": {}},
    "workers": WORKERS,
}
SWEEP: dict[str, Any] = {
    "base": {**RUN, "workers": 1},
    "space": {"losses.ce.params.label_smoothing": {"grid": [0.0, 0.1, 0.2]}},
    "seeds": 2,
    "search": {"max_concurrent": 2},
}
Kill = Callable[[psutil.Process], None]


@contextmanager
def several_nodes(cpus: int = (WORKERS + SPARE_CPUS) // NODES) -> Iterator[Cluster]:
    """A head that works nothing and nodes that do, with this process as their driver."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(NODES):
        nodes.add_node(num_cpus=cpus)
    os.environ["RAY_ADDRESS"] = nodes.address
    try:
        with cluster():
            nodes.wait_for_nodes()
            yield nodes
    finally:
        nodes.shutdown()


def working(name: str) -> psutil.Process:
    """One of Ray's workers of that name."""
    below = psutil.Process().children(recursive=True)
    return next(one for one in below if name in " ".join(one.cmdline()))


def raylet_of(worker: psutil.Process) -> psutil.Process:
    raylet = worker.parent()
    assert raylet is not None
    return raylet


def kill_worker(worker: psutil.Process) -> None:
    worker.kill()


def kill_node(worker: psutil.Process) -> None:
    raylet = raylet_of(worker)
    for one in [raylet, *raylet.children(recursive=True)]:
        one.kill()


def warn_and_kill_node(worker: psutil.Process) -> None:
    """What a cloud does with a spot instance: it says so, and then takes it."""
    words = raylet_of(worker).cmdline()
    named = {
        f"--raylet_socket_name={one['RayletSocketName']}": one["NodeID"] for one in ray.nodes()
    }
    (node,) = [node for word, node in named.items() if word in words]
    gcs = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = gcs.drain_node(node, reason, "spot", time_ns() // 10**6 + WARNED_S * 1000)
    assert accepted, why
    kill_node(worker)


def kill_head(worker: psutil.Process) -> None:
    working("gcs_server").kill()


KILLS: Mapping[str, Kill] = {
    "worker": kill_worker,
    "node": kill_node,
    "spot": warn_and_kill_node,
    "head": kill_head,
}


def kill_every_node(worker: psutil.Process) -> None:
    """All but the head's, which has no room for workers."""
    own = [one for one in ray.nodes() if "node:__internal_head__" not in one["Resources"]]
    words = {f"--raylet_socket_name={one['RayletSocketName']}" for one in own}
    below = psutil.Process().children(recursive=True)
    raylets = [one for one in below if words & set(one.cmdline())]
    for one in [held for raylet in raylets for held in [raylet, *raylet.children(recursive=True)]]:
        with suppress(psutil.NoSuchProcess):  # it has ended with its raylet
            one.kill()


def train(victim: str) -> None:
    """A run with workers; somebody is killed when it tells of an epoch."""
    run = validated(RunConfig, RUN, where="toy")
    waiting = [KILLS[victim]] if victim in KILLS else []

    def told(metrics: Metrics) -> None:
        print(json.dumps(metrics), flush=True)
        if waiting and metrics["epoch"] == AT_EPOCH:
            waiting.pop()(working("RayTrainWorker"))

    inputs = Inputs(read_pictures(run.data, "train"))
    # an announced loss is no failure: with none allowed the run goes on
    allowed = 0 if victim == "spot" else MAX_FAILURES
    with patch("pipelines.train.MAX_FAILURES", allowed):
        print(json.dumps(train_on_workers(run, inputs, told).history))


@dataclass(frozen=True)
class Patient(Inputs):
    """Waits for its loss after one epoch, and after some with fewer workers for all of them."""

    def fit(
        self, run: RunConfig, *, report: Report, resume: Path | None = None, rank: int = 0
    ) -> Progress:
        def told(metrics: Metrics | None, folder: Path | None) -> None:
            report(metrics, folder)
            waits = {AT_EPOCH: resume is None, FEWER_UNTIL: num_workers() < run.workers}
            if metrics and waits.get(int(metrics["epoch"])):
                Event().wait()  # until Ray ends this worker, to start as many as there can be

        return super().fit(run, report=told, resume=resume, rank=rank)


def train_with_another_node(
    run: RunConfig,
    inputs: Inputs,
    nodes: Cluster,
    *,
    kill: Kill,
    is_time: Callable[[Metrics], bool],
    more_s: float = 0.0,
    cpus: int,
) -> None:
    """A run that loses nodes; another comes when it is time by an epoch's metrics, or later."""
    waiting, now = [kill], Event()

    def told(metrics: Metrics) -> None:
        print(json.dumps(metrics), flush=True)
        if is_time(metrics):
            now.set()
        if waiting and metrics["epoch"] == AT_EPOCH:
            waiting.pop()(working("RayTrainWorker"))

    with ThreadPoolExecutor(1) as pool:
        trained = pool.submit(train_on_workers, run, inputs, told)
        trained.add_done_callback(lambda _: now.set())  # if it fails before
        now.wait()
        with suppress(TimeoutError):
            trained.result(timeout=more_s)
        nodes.add_node(num_cpus=cpus)
        print(json.dumps(trained.result().history))


def train_until_a_node_comes() -> None:
    """All nodes are lost, and one comes only when workers were started twice in vain."""
    run = validated(RunConfig, RUN, where="toy")
    start_s = float(os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"])
    with several_nodes() as nodes:
        train_with_another_node(
            run,
            Inputs(read_pictures(run.data, "train")),
            nodes,
            kill=kill_every_node,
            is_time=lambda metrics: metrics["epoch"] == AT_EPOCH,
            more_s=2.5 * start_s,  # twice in vain, and half of a third time
            cpus=WORKERS + SPARE_CPUS,
        )


def train_elastic() -> None:
    """A node of two is lost, each of which has room for one worker, and one comes later."""
    run = validated(RunConfig, {**RUN, "min_workers": 1}, where="toy")
    with several_nodes(cpus=1) as nodes, patch("pipelines.train.REGROW_S", 2.0):
        train_with_another_node(
            run,
            Patient(read_pictures(run.data, "train")),
            nodes,
            kill=kill_node,
            is_time=lambda metrics: metrics["epoch"] == FEWER_UNTIL,
            cpus=1,
        )


def run_sweep(victim: str) -> None:
    """A sweep of flat trials; the node of one is killed when another has ended."""
    waiting = [kill_node] if victim == "trial_node" else []

    def show(standing: Standing) -> None:
        print(json.dumps({"done": standing.done, "running": len(standing.running)}), flush=True)
        if waiting and standing.done and standing.running:
            waiting.pop()(working("ImplicitFunc"))

    config = validated(SweepConfig, SWEEP, where="toy")
    outcome = sweep(config, watch=lambda *_: None, show=show, tracker=Tracker(), verbose=False)
    print(json.dumps([[row.label, row.values] for row in outcome.rows]))


def main(folder: str, victim: str) -> None:
    Path(folder).mkdir(exist_ok=True)
    os.chdir(folder)
    if victim in ("elastic", "every_node"):
        train_elastic() if victim == "elastic" else train_until_a_node_comes()
        return
    with several_nodes():
        run_sweep(victim) if "trial" in victim else train(victim)


if __name__ == "__main__":
    main(*sys.argv[1:])
