"""Two gloo workers train the graphical model that one process trains: noise belongs to rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipelines.generative_workers import CASES

WORKER = Path(__file__).with_name("generative_workers.py")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("generative_workers")
    environment = os.environ | {"PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        printed = [worker.communicate(timeout=180)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert not any(worker.returncode for worker in workers), "\n".join(printed)
    found: dict[str, Any] = torch.load(folder / "measured.pt")
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_workers_train_the_model_of_one_process(name: str, measured: dict[str, Any]) -> None:
    one, two = measured[name]["one"], measured[name]["two"]
    assert one["losses"][0] != one["losses"][1]
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-4, atol=1e-6)
