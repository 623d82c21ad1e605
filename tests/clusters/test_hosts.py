"""DDP across two hosts, one cut off in the middle and back again: the numbers are the same."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.disturbed import EPOCHS
from tests.clusters.hosts import Host, settings, start_ray, two_hosts
from tests.clusters.test_faults import check_nothing_was_lost, numbers

pytestmark = pytest.mark.timeout(900)


@dataclass
class Pair:
    """Two hosts with Ray on both."""

    head: Host
    other: Host
    token: str
    ray: subprocess.Popen[str]  # of the other


@pytest.fixture
def hosts() -> Iterator[Pair]:
    folder = Path(tempfile.mkdtemp(prefix="kd-", dir="/tmp"))  # sockets must have short names
    token = secrets.token_hex(32)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        try:
            head, other = stack.enter_context(two_hosts(folder))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here, which needs root and ip: {error}")
        start_ray(head, is_head=True, token=token)
        yield Pair(head, other, token, start_ray(other, is_head=False, token=token))


def trained(pair: Pair, folder: Path, to_lose: str) -> tuple[list[Any], list[str]]:
    """What a run across both hosts told, and what else it said."""
    driver = pair.head.start(
        sys.executable,
        *("-m", "tests.clusters.hosts", folder, to_lose),
        **settings(pair.token),
    )
    assert driver.stdout is not None
    told, said = [], []
    for line in driver.stdout:
        if line.startswith(("{", "[")):
            told.append(json.loads(line))
            continue
        said.append(line.strip())
        if line.strip() == "cut":
            pair.other.link("down")
        elif line.strip() == "lost":
            pair.other.link("up")
            pair.ray.wait(timeout=120)  # it sees that it was given up
            pair.ray = start_ray(pair.other, is_head=False, token=pair.token)
    assert driver.wait() == 0, "\n".join(said)
    return told, said


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_a_host_that_is_cut_off_and_comes_back_changes_no_number(
    hosts: Pair, tmp_path: Path
) -> None:
    (*told, undisturbed), _ = trained(hosts, tmp_path / "whole", "nothing")
    assert len(told) == EPOCHS
    (*told, history), said = trained(hosts, tmp_path / "cut", "lost")
    assert {"cut", "lost"} <= set(said)
    assert len(told) > EPOCHS, "the run was not disturbed: no epoch was told again"
    assert numbers(history) == numbers(undisturbed)
    check_nothing_was_lost(told, history)
