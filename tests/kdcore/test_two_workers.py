"""Two gloo processes with half of the batch each have the gradient of one with the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcore.losses import LOSSES

WORKER = Path(__file__).with_name("two_workers.py")
# the cases of the script: each loss, and on a pair of maps those that take layers
CASES = [key for key, loss in LOSSES.items() if loss.default_layers or not loss.takes_layers]
CASES += [f"{key}-map" for key, loss in LOSSES.items() if loss.takes_layers]

Measured = dict[str, dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("two_workers")
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


def test_the_workers_measured_every_loss(measured: Measured) -> None:
    assert set(measured) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_two_workers_have_the_value_and_the_gradients_of_one_process(
    name: str, measured: Measured
) -> None:
    assert any(bool((gradient != 0).any()) for gradient in measured[name]["one"].values())
    torch.testing.assert_close(measured[name]["two"], measured[name]["one"], rtol=1e-12, atol=1e-12)
