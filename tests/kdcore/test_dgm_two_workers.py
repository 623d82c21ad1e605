"""Two gloo processes with half of a teacher's run each have the gradient of one with the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcore.dgm.objective import PUBLISHED

WORKER = Path(__file__).with_name("dgm_two_workers.py")

Measured = dict[str, dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("dgm_two_workers")
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
        printed = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(printed)
    return torch.load(folder / "measured.pt")


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_workers_have_the_loss_and_the_gradients_of_one_process(
    name: str, measured: Measured
) -> None:
    one, two = measured[name]["one"], measured[name]["two"]
    assert any(bool((gradient != 0).any()) for gradient in one.values())
    torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)
