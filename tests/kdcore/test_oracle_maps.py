"""What the classic oracle says of maps beyond a value and one gradient: its ``extra``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcore.losses.boundaries import gaussian_margin
from kdcore.losses.hints import gaussian_nll

FOLDER = Path(os.environ.get("KD_ORACLES", Path(__file__).parents[3] / "shared" / "oracles"))
FILE = FOLDER / "classic.json"

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not FILE.is_file(), reason=f"no oracles at {FILE}; KD_ORACLES names them"),
]

ENTRIES = json.loads(FILE.read_text())["entries"] if FILE.is_file() else []


def gradient_of_the_spread(entry: Mapping[str, Any], tensors: list[Tensor]) -> Tensor:
    student, teacher, spread = tensors
    value = gaussian_nll(student, teacher, spread.requires_grad_(), eps=entry["params"]["eps"])
    return torch.autograd.grad(value, spread)[0]


FORMULAS: Mapping[str, Callable[[Mapping[str, Any], list[Tensor]], Tensor]] = {
    "grad_raw": gradient_of_the_spread,
    "grad_raw_fro": lambda entry, tensors: gradient_of_the_spread(entry, tensors).norm(),
    "margins": lambda entry, tensors: gaussian_margin(*tensors),
}
EXTRAS = [(entry, key) for entry in ENTRIES for key in entry.get("extra", {})]


@pytest.mark.parametrize(
    ("entry", "key"),
    [pytest.param(*each, id=f"classic-{each[0]['name']}-{each[1]}") for each in EXTRAS],
)
def test_what_the_entry_adds_is_ours(entry: Mapping[str, Any], key: str) -> None:
    with np.load(FOLDER / "classic_inputs.npz") as stored:
        tensors = [torch.from_numpy(stored[name]) for name in entry["inputs"]]
    expected = torch.tensor(entry["extra"][key], dtype=torch.float64)
    torch.testing.assert_close(FORMULAS[key](entry, tensors), expected, rtol=1e-8, atol=1e-12)
