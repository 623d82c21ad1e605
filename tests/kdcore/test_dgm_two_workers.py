"""Two gloo processes with half of a teacher's run each have the gradient of one with the whole."""

from __future__ import annotations

import pytest
import torch

from kdcore.dgm.objective import PUBLISHED
from tests.kdcore.gloo import Measured, measured_by


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measured_by("dgm_two_workers.py", tmp_path_factory.mktemp("dgm_two_workers"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_workers_have_the_loss_and_the_gradients_of_one_process(
    name: str, measured: Measured
) -> None:
    one, two = measured[name]["one"], measured[name]["two"]
    assert any(bool((gradient != 0).any()) for gradient in one.values())
    torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)
