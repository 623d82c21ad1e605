"""Two gloo processes with half of a teacher's run each have the gradient of one with the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdcore.dgm.objective import PUBLISHED
from tests.gloo import Measured, measured_by


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    script = Path(__file__).with_name("dgm_two_workers.py")
    return measured_by(script, tmp_path_factory.mktemp("dgm_two_workers"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_workers_have_the_loss_and_the_gradients_of_one_process(
    name: str, measured: Measured
) -> None:
    one, two = measured[name]["one"], measured[name]["two"]
    assert any(bool((gradient != 0).any()) for gradient in one.values())
    torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)
