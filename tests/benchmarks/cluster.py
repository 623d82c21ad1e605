"""What more nodes and workers bring, and what a lost worker costs, on raylets of one machine.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/cluster.py [nodes] [workers] [recovery] > RESULT.md

Wall time. Nodes that share the cores of one machine show what a cluster costs, not what it brings:
beyond as many as there are cores nothing more can be gained.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.cluster import num_cores
from pipelines.tracking import COMMIT, commit

ROOT = Path(__file__).parents[2]
NODES, FILES, CLASSES = (1, 2, 4), 6, 100
BATCH, STEPS, ROUNDS = 64, 3, 3


def started(*words: str) -> subprocess.Popen[str]:
    """A process of its own: Ray keeps the first token that it finds."""
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | settings | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def lines_of(process: subprocess.Popen[str]) -> Iterator[Any]:
    """The values that a process prints as JSON."""
    for line in process.stdout or []:
        if line[:1] in ("{", "["):
            yield json.loads(line)
    if process.wait():
        raise RuntimeError(f"{process.args} ended with {process.returncode}")


def table(heading: str, *columns: str) -> None:
    print(f"\n| {' | '.join([heading, *columns])} |\n|---|{'---:|' * len(columns)}")


def nodes() -> None:
    """The rate of the files after the first of each node; what comes before is the start."""
    table("cache by resnet20, nodes", "images/s", "start, s")
    for count in NODES:
        ((told, total),) = lines_of(started(__file__, "write_on", str(count)))
        (first, rows), (last, every) = told[count], told[-1]
        rate = (every - rows) / (last - first)
        print(f"| {count} | {rate:.0f} | {total - every / rate:.1f} |", flush=True)


def write_on(count: int) -> None:
    """Seconds since the start and rows that are done, and how long it took."""
    from ray.cluster_utils import Cluster

    from kdcore.models import MODELS
    from kdcore.taps import Tapped
    from kdcore.teachers import freeze
    from pipelines.cache.columns import columns_of
    from pipelines.cache.storage import store_at
    from pipelines.cache.write import write_cache
    from pipelines.cluster import cluster
    from pipelines.config import RunConfig
    from pipelines.sources import Pictures
    from pipelines.strict import validated

    rows = FILES * 2048
    drawn = np.random.default_rng(0)
    image = drawn.integers(0, 256, (rows, 3, 32, 32), dtype=np.uint8)
    pictures = Pictures(image, drawn.integers(0, CLASSES, rows), CLASSES)
    teacher = freeze(Tapped(MODELS["resnet20"](CLASSES, 3)))
    content = {
        "student": {"name": "resnet8x4"},
        "teacher": {"name": "resnet20", "weights": "none.safetensors"},
        "data": {"name": "digits", "views": 1, "mean": [0.5] * 3, "std": [0.25] * 3},
        "epochs": 1,
        "losses": {"kd": {}},
    }
    run = validated(RunConfig, content, where="noise")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(count):
        made.add_node(num_cpus=2)  # one for its actor, one for what only waits
    os.environ["RAY_ADDRESS"] = made.address
    told: list[tuple[float, int]] = []
    one_each = patch("pipelines.cache.write.workers_at_once", lambda: count)
    with tempfile.TemporaryDirectory() as folder, one_each, cluster():
        made.wait_for_nodes()
        began = time.perf_counter()

        def watch(done: int, total: int, *note: str) -> None:
            told.append((time.perf_counter() - began, done))

        store, columns = store_at(folder), columns_of("float16", teacher)
        write_cache(run, pictures, teacher, store, columns, watch)
        spent = time.perf_counter() - began
    made.shutdown()
    print(json.dumps([told, spent]), flush=True)


def workers() -> None:
    """Steps of resnet8x4 by one process and by two gloo workers that share each batch."""
    table(f"DDP of resnet8x4, batch {BATCH}", "images/s", "network's share")
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                started(__file__, "step_on", folder, str(rank), str(count)) for rank in range(count)
            ]
            ((whole, alone),) = lines_of(ranks[0])
            for rank in ranks[1:]:
                rank.wait()
        share = f"{max(0.0, 1 - alone / whole):.1%}" if count > 1 else "-"
        print(f"| {count} | {BATCH / whole:.0f} | {share} |", flush=True)


def step_on(folder: str, rank: int, count: int) -> None:
    """Seconds of a step with the gradients' reduction, and without; the best of some rounds."""
    from kdcore.models import MODELS

    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count)
    torch.manual_seed(0)
    net: nn.Module = MODELS["resnet8x4"](CLASSES, 3)
    module = DistributedDataParallel(net) if count > 1 else net
    image = torch.randn(BATCH // count, 3, 32, 32)
    label = torch.randint(0, CLASSES, (BATCH // count,))

    def steps(*, reduced: bool) -> Callable[[], None]:
        def work() -> None:
            for _ in range(STEPS):
                with nullcontext() if reduced or count == 1 else module.no_sync():
                    F.cross_entropy(module(image), label).backward()

        return work

    def seconds(work: Callable[[], None]) -> float:
        dist.barrier()
        start = time.perf_counter()
        work()
        dist.barrier()
        return (time.perf_counter() - start) / STEPS

    both = steps(reduced=True), steps(reduced=False)
    both[0]()
    # turn by turn, so that what the machine does meanwhile meets both
    pairs = [[seconds(work) for work in both] for _ in range(ROUNDS)]
    if rank == 0:
        print(json.dumps([min(times) for times in zip(*pairs, strict=True)]), flush=True)
    dist.destroy_process_group()


def recovery() -> None:
    """From the word of an epoch, at which somebody is killed, to that of the first new one."""
    table("lost", "s until it goes on", "s of an epoch")
    for victim in ("worker", "node"):
        with tempfile.TemporaryDirectory() as folder:
            process = started("-m", "tests.clusters.disturbed", folder, victim)
            told: list[tuple[float, int]] = []
            for line in lines_of(process):
                if isinstance(line, dict):
                    told.append((time.perf_counter(), line["epoch"]))
        # where it is told of epochs again, the run has gone on from its checkpoint
        epochs = [epoch for _, epoch in told]
        again = next(place for place in range(1, len(told)) if epochs[place] <= epochs[place - 1])
        newest = max(epochs[:again])
        after = next(moment for moment, epoch in told[again:] if epoch > newest)
        before = told[again - 1][0]
        usual = (told[again - 1][0] - told[0][0]) / (newest - 1)
        print(f"| {victim} | {after - before:.1f} | {usual:.2f} |", flush=True)


def main(*parts: str) -> None:
    if parts[:1] == ("write_on",):
        write_on(int(parts[1]))
    elif parts[:1] == ("step_on",):
        step_on(parts[1], int(parts[2]), int(parts[3]))
    else:
        print("# What nodes and workers bring, and what a lost one costs\n\n`cluster.py` at commit")
        print(f"{commit().get(COMMIT, '(none)')}, wall time, {num_cores()} cores for all nodes.")
        for part in parts or ("nodes", "workers", "recovery"):
            {"nodes": nodes, "workers": workers, "recovery": recovery}[part]()


if __name__ == "__main__":
    main(*sys.argv[1:])
