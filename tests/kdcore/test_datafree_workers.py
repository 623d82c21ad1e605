"""Two gloo processes that invent and learn together become what one becomes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gloo import Measured, measured_by

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


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    script = Path(__file__).with_name("datafree_workers.py")
    return measured_by(script, tmp_path_factory.mktemp("datafree_workers"))


@pytest.mark.parametrize("name", CASES)
def test_two_workers_become_what_one_process_becomes(name: str, measured: Measured) -> None:
    assert set(measured) == set(CASES)
    one, two = measured[name]["one"], measured[name]["two"]
    assert any(key.startswith("student") for key in one)
    # Adam divides gradients that are rounding errors, as of a bias before BatchNorm, by their size
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-7)
