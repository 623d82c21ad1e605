"""Scripts of two gloo workers: how a test starts them, and how they find each other.

They are scripts rather than functions of a test, because pytest's importlib mode gives test
modules no name that a spawned process could import. Each is called with its rank and a folder, in
which rank 0 leaves what was measured.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# It has the group as default arguments. Imported after the group is there, as by the first model
# under DDP, it keeps the group beyond its destruction, whose threads may then free a tensor while
# the interpreter ends: "terminate called without an active exception".
import torch.distributed.nn
from torch import Tensor

NUM_WORKERS = 2
Measured = dict[str, dict[str, dict[str, Any]]]  # of each case by one process, and by two
_MEASURED = "measured.pt"
_SECONDS = 180


def measured_by(script: Path, folder: Path) -> Measured:
    """What both workers of a script measured together."""
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(NUM_WORKERS)
    ]
    try:
        printed = [worker.communicate(timeout=_SECONDS)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert not any(worker.returncode for worker in workers), "\n".join(printed)
    measured: Measured = torch.load(folder / _MEASURED)
    return measured


@contextmanager
def joined(rank: int, folder: Path, measured: Measured) -> Iterator[None]:
    """This process as one of the workers; at the end rank 0 writes what was measured."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=NUM_WORKERS,
        timeout=timedelta(seconds=_SECONDS),
    )
    group = weakref.ref(dist.group.WORLD)
    yield
    if rank == 0:
        torch.save(measured, folder / _MEASURED)
    dist.destroy_process_group()
    gc.collect()  # a model under DDP is in a cycle with itself
    assert group() is None, "something still holds the group, see the imports"


def mean_over_workers(value: Tensor) -> Tensor:
    """A value that each worker has for its own rows."""
    total = value.clone()
    dist.all_reduce(total)
    return total / NUM_WORKERS
