"""Every number of the classic oracle, in value and gradient, in float64 and float32."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kdcore import classic_logits, classic_maps

FOLDER = Path(os.environ.get("KD_ORACLES", Path(__file__).parents[3] / "shared" / "oracles"))
FILE = FOLDER / "classic.json"

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not FILE.is_file(), reason=f"no oracles at {FILE}; KD_ORACLES names them"),
    pytest.mark.usefixtures("without_shape_checks"),
]

Entry = Mapping[str, Any]
ENTRIES: list[Entry] = json.loads(FILE.read_text())["entries"] if FILE.is_file() else []
ADAPTERS = {**classic_logits.ADAPTERS, **classic_maps.ADAPTERS}
# where a plain float32 version lost the gradient, there is none to compare
HAS_GRADIENT = [entry for entry in ENTRIES if entry["grad_wrt"] is not None]
KEEPS_GRADIENT = [entry for entry in HAS_GRADIENT if entry["float32_grad_rel_diff"] < 1e-3]


def named(entries: list[Entry]) -> list[Any]:
    return [pytest.param(entry, id=f"classic-{entry['name']}") for entry in entries]


def method(name: str) -> str:
    """The longest method of the tables that an entry's name begins with."""
    methods = [known for known in ADAPTERS if f"{name}_".startswith(f"{known}_")]
    if not methods:
        pytest.fail(f"the library has nothing for the entry {name!r}")
    return max(methods, key=len)


@cache
def stored() -> Mapping[str, Tensor]:
    with np.load(FOLDER / "classic_inputs.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def inputs(entry: Entry, dtype: torch.dtype) -> list[Tensor]:
    tensors = [stored()[name].clone() for name in entry["inputs"]]
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]


def value_and_gradient(entry: Entry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tensors = inputs(entry, dtype)
    asked = tensors[entry["inputs"].index(entry["grad_wrt"])].requires_grad_()
    value = ADAPTERS[method(entry["name"])](entry, tensors)
    value.backward()
    assert asked.grad is not None
    return value.detach().double(), asked.grad.double()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("entry", named(ENTRIES))
def test_the_value_is_the_oracles(entry: Entry) -> None:
    relative = 1e-9 if entry["name"].endswith(("_big", "_huge")) else 1e-10
    for dtype, tolerance in ((torch.float64, relative), (torch.float32, 1e-4)):
        value = ADAPTERS[method(entry["name"])](entry, inputs(entry, dtype))
        assert value.dtype is dtype
        torch.testing.assert_close(
            value.double(), scalar(entry["value"]), rtol=tolerance, atol=1e-13
        )


@pytest.mark.parametrize("entry", named(HAS_GRADIENT))
def test_the_gradient_is_the_oracles(entry: Entry) -> None:
    _, gradient = value_and_gradient(entry, torch.float64)
    wave = torch.arange(gradient.numel(), dtype=torch.float64).cos()
    found = torch.stack([gradient.norm(), gradient.flatten() @ wave])
    expected = torch.stack([scalar(entry["grad_fro"]), scalar(entry["grad_dot"])])
    absolute = 1e-12 if entry in KEEPS_GRADIENT else 1e-10
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=absolute)


@pytest.mark.parametrize("entry", named(KEEPS_GRADIENT))
def test_the_gradient_in_float32_is_that_in_float64(entry: Entry) -> None:
    _, exact = value_and_gradient(entry, torch.float64)
    _, single = value_and_gradient(entry, torch.float32)
    assert float((single - exact).norm() / exact.norm()) < 1e-3
