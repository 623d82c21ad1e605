"""Two gloo processes with half of the batch each have the gradient of one with the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdcore.losses import LOSSES
from tests.gloo import Measured, measured_by

# the cases of the script: each loss, and on a pair of maps those that take layers
CASES = [key for key, loss in LOSSES.items() if loss.default_layers or not loss.takes_layers]
CASES += [f"{key}-map" for key, loss in LOSSES.items() if loss.takes_layers]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    script = Path(__file__).with_name("two_workers.py")
    return measured_by(script, tmp_path_factory.mktemp("two_workers"))


def test_the_workers_measured_every_loss(measured: Measured) -> None:
    assert set(measured) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_two_workers_have_the_value_and_the_gradients_of_one_process(
    name: str, measured: Measured
) -> None:
    assert any(bool((gradient != 0).any()) for gradient in measured[name]["one"].values())
    torch.testing.assert_close(measured[name]["two"], measured[name]["one"], rtol=1e-12, atol=1e-12)
