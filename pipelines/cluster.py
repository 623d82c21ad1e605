"""Ray, started once per command: a private local one, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import ray

# CPUs are a count for Ray, not a binding: two more than there are, so that what only waits (a
# pipeline's reader, a trial that drives its own workers) never keeps work from starting.
SPARE_CPUS = 2


@contextmanager
def cluster(*, verbose: bool = False, dashboard: bool = False) -> Iterator[None]:
    """Ray for the length of the block; the caller's own, if it has one already.

    Without RAY_ADDRESS a new cluster on this machine, never one that happens to run on it. The
    dashboard is needed where a trial that drives workers of its own may be stopped early: nothing
    else frees them.

    Raises ValueError where RAY_ADDRESS names a cluster and nothing names its token.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    if address != "local":
        check_token()
    if address == "local" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    local = {"num_cpus": num_cores() + SPARE_CPUS, "include_dashboard": dashboard}
    with nullcontext() if verbose else _silent_stderr():
        ray.init(
            address=address,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            **(local if address == "local" else {}),
        )
    if not verbose:
        for name in ("ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def check_token() -> None:
    """Raise ValueError where nothing says how a cluster is joined.

    Left alone, Ray takes the token that a home directory happens to hold.
    """
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if not named and os.environ.get("RAY_AUTH_MODE") != "disabled":
        raise ValueError(
            "expected the cluster's token in RAY_AUTH_TOKEN or its file in RAY_AUTH_TOKEN_PATH, "
            "found neither; a cluster that asks for none needs RAY_AUTH_MODE=disabled"
        )


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Ray's native part announces at its start that it will be silent; what fails still raises."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def work_in(folder: Path) -> None:
    """Go where the driver is, on a node that has that folder: a run's relative paths are of it.

    The workers of a cluster that stood before start where its nodes were started.
    """
    with suppress(FileNotFoundError):
        os.chdir(folder)


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def capacity() -> Mapping[str, float]:
    """What the cluster has, or can grow to where its nodes come when they are asked for."""
    there = ray.cluster_resources()
    grown = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {name: max(there.get(name, 0), grown.get(name, 0)) for name in {*there, *grown}}


def gpus_there() -> float:
    """The GPUs of the cluster."""
    return float(capacity().get("GPU", 0))


def workers_at_once() -> int:
    """How many one-core workers the cluster runs side by side: one per GPU, else one per core."""
    resources = capacity()
    cpus = math.floor(resources.get("CPU", 1)) - SPARE_CPUS
    return max(1, min(cpus, math.floor(resources.get("GPU") or cpus)))


def worker_resources() -> dict[str, float]:
    """What one worker asks Ray for."""
    return {"CPU": 1, "GPU": 1} if capacity().get("GPU") else {"CPU": 1}
