"""Whoever is lost while a run is trained, its numbers are those of an undisturbed one, exactly."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from tests.clusters.disturbed import AT_EPOCH, EPOCHS, FEWER_UNTIL, WORKERS
from tests.timeless import timeless

# each starts a Ray of its own of three nodes, which takes 20 s
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
Line = dict[str, Any]


def trained(folder: Path, victim: str) -> tuple[list[Any], subprocess.CompletedProcess[str]]:
    """What a disturbed process said, and how it ended."""
    command = [sys.executable, "-m", "tests.clusters.disturbed", str(folder), victim]
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # who has lost the head gives up soon
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # who has lost a node tries again soon
    }
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            told, errors = process.communicate(timeout=600)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, SIGKILL)  # its nodes, where it could not end them
    said = [json.loads(line) for line in told.splitlines() if line[:1] in ("{", "[")]
    return said, subprocess.CompletedProcess(command, process.returncode, told, errors)


def numbers(history: list[Line]) -> list[Line]:
    """What must be equal: all but the time and the machine that it took."""
    return [timeless(epoch) for epoch in history]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    said, done = trained(tmp_path_factory.mktemp("run"), "nobody")
    assert done.returncode == 0, done.stderr
    assert len(said) == EPOCHS + 1, "no epoch was told twice"
    return list(said[-1])


def check_nothing_was_lost(told: list[Line], history: list[Line]) -> None:
    """Epochs whose checkpoints were there were not trained again: they took the same time."""
    assert history[: AT_EPOCH - 1] == told[: AT_EPOCH - 1]


@pytest.mark.parametrize("victim", ["worker", "node", "spot"])
def test_who_is_lost_costs_nothing_but_time(
    tmp_path: Path, undisturbed: list[Line], victim: str
) -> None:
    (*told, history), done = trained(tmp_path, victim)
    assert done.returncode == 0, done.stderr
    assert len(told) > EPOCHS, "the run was not disturbed: no epoch was told again"
    assert numbers(history) == numbers(undisturbed)
    check_nothing_was_lost(told, history)


def test_a_run_waits_for_the_node_that_comes_instead_of_those_lost(
    tmp_path: Path, undisturbed: list[Line]
) -> None:
    (*told, history), done = trained(tmp_path, "every_node")
    assert done.returncode == 0, done.stderr
    assert numbers(history) == numbers(undisturbed)
    check_nothing_was_lost(told, history)


def test_who_has_lost_the_head_goes_on_in_a_new_cluster_when_called_again(
    tmp_path: Path, undisturbed: list[Line]
) -> None:
    told, done = trained(tmp_path, "head")
    assert done.returncode != 0
    assert AT_EPOCH <= len(told) < EPOCHS
    (*_, history), done = trained(tmp_path, "nobody")
    assert done.returncode == 0, done.stderr
    assert numbers(history) == numbers(undisturbed)
    check_nothing_was_lost(told, history)


def test_an_elastic_run_goes_on_with_fewer_workers_and_grows_back(
    tmp_path: Path, undisturbed: list[Line]
) -> None:
    (*told, history), done = trained(tmp_path, "elastic")
    assert done.returncode == 0, done.stderr
    fewer = FEWER_UNTIL - AT_EPOCH
    workers = [WORKERS] * AT_EPOCH + [1] * fewer + [WORKERS] * (EPOCHS - FEWER_UNTIL)
    assert [epoch["system/workers"] for epoch in history] == workers
    assert numbers(history[:AT_EPOCH]) == numbers(undisturbed[:AT_EPOCH])
    assert history[:AT_EPOCH] == told[:AT_EPOCH], "no epoch was trained again"
    # each batch has the same rows, but not in the same shares, which BatchNorm sees
    last, expected = history[-1]["train/loss"], undisturbed[-1]["train/loss"]
    assert last == pytest.approx(expected, rel=0.1)
    assert last < undisturbed[AT_EPOCH]["train/loss"] / 2


def test_a_node_lost_during_a_sweep_costs_no_trial(tmp_path: Path) -> None:
    (*_, expected), done = trained(tmp_path / "whole", "no_trial")
    assert done.returncode == 0, done.stderr
    (*_, ranked), done = trained(tmp_path / "lost", "trial_node")
    assert done.returncode == 0, done.stderr
    assert ranked == expected
    assert len(ranked) == 3
    assert all(len(values) == WORKERS for _, values in ranked), "a seed is lacking"
