"""Two gloo processes that invent and learn together become what one becomes alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

WORKER = Path(__file__).with_name("datafree_workers.py")
CASES = [
    "adaptive_deepinversion",
    "dafl",
    "zskt",
    "dfq",
    "cmi",
    "fast",
    "dfq-ensemble",
    "fast-reptile",
    "dafl-replay",
    "inversion-norms",
]

Measured = dict[str, dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("datafree_workers")
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
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(printed)
    return torch.load(folder / "measured.pt")


@pytest.mark.parametrize("name", CASES)
def test_two_workers_become_what_one_process_becomes(name: str, measured: Measured) -> None:
    assert set(measured) == set(CASES)
    one, two = measured[name]["one"], measured[name]["two"]
    assert any(key.startswith("student") for key in one)
    # Adam divides gradients that are rounding errors, as of a bias before BatchNorm, by their size
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-7)
