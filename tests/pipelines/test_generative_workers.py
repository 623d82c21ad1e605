"""Two gloo workers train the graphical model that one process trains: noise belongs to rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gloo import Measured, measured_by
from tests.pipelines.generative_workers import CASES


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    script = Path(__file__).with_name("generative_workers.py")
    return measured_by(script, tmp_path_factory.mktemp("generative_workers"))


@pytest.mark.parametrize("name", CASES)
def test_two_workers_train_the_model_of_one_process(name: str, measured: Measured) -> None:
    one, two = measured[name]["one"], measured[name]["two"]
    assert one["losses"][0] != one["losses"][1]
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-4, atol=1e-5)
    # where a rectifier's input is zero up to rounding, either of two gradients is right
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-3, atol=2e-3)
