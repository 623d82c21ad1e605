"""Writes a cache in a process of its own, in which somebody is killed on the way.

Usage: python -m tests.pipelines.fill_cache FOLDER VICTIM ROWS, where VICTIM is ``driver``,
``actor`` or ``node`` and ROWS are those that are written before; ``nobody`` is killed without Ray,
and the process then waits for a line of its input. Prints which files stood then.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import ray
import torch
from ray.cluster_utils import Cluster

from pipelines.cache import write as writing
from pipelines.cluster import SPARE_CPUS, cluster
from tests.pipelines.caches import (
    ROWS_PER_CRASH_FILE,
    crash_run,
    files_of,
    write,
    written_here,
)

ACTORS = 2
Kill = Callable[[], None]


def kill_driver() -> None:
    psutil.Process().kill()


def wait_for_a_line() -> None:
    sys.stdin.readline()


def kill_actor() -> None:
    below = psutil.Process().children(recursive=True)
    next(one for one in below if "_Actor" in " ".join(one.cmdline())).kill()


@contextmanager
def one_machine(kill: Kill) -> Iterator[Kill]:
    with cluster():
        yield kill


@contextmanager
def without_ray() -> Iterator[Kill]:
    torch.set_num_threads(1)
    writing.written = written_here
    yield wait_for_a_line


@contextmanager
def two_nodes() -> Iterator[Kill]:
    """One actor on each of two nodes, and who kills all processes of the second."""
    # Ray's processes want a token, and only ``ray.init`` makes one by itself
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": ACTORS + SPARE_CPUS - 1})
    second = nodes.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = nodes.address
    try:
        with cluster():
            nodes.wait_for_nodes()
            assert ray.cluster_resources()["CPU"] == ACTORS + SPARE_CPUS
            yield lambda: nodes.remove_node(second, allow_graceful=False)
    finally:
        nodes.shutdown()


VICTIMS: Mapping[str, Callable[[], AbstractContextManager[Kill]]] = {
    "nobody": without_ray,
    "driver": lambda: one_machine(kill_driver),
    "actor": lambda: one_machine(kill_actor),
    "node": two_nodes,
}


def main(folder: str, victim: str, rows: str) -> None:
    waiting = [int(rows)]
    with VICTIMS[victim]() as kill:

        def told(done: int, total: int, note: str) -> None:
            if waiting and done >= waiting[0]:
                waiting.clear()
                (cache,) = Path(folder).iterdir()
                print(json.dumps(files_of(cache)), flush=True)
                kill()

        write(crash_run(folder), watch=told, rows_per_file=ROWS_PER_CRASH_FILE)


if __name__ == "__main__":
    main(*sys.argv[1:])
