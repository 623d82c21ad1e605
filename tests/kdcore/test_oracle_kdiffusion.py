"""Every number of the KDiffusion oracle: schedules, posteriors, combinations, likelihoods."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.kdiffusion.likelihood import gaussian_nll, rollout
from kdcore.kdiffusion.schedule import (
    ReverseSteps,
    implicit_posterior,
    log_amplitudes,
    noise_variance,
    reverse_steps,
    signal_gain,
    transition,
)

FOLDER = Path(os.environ.get("KD_ORACLES", Path(__file__).parents[3] / "shared" / "oracles"))
FILE = FOLDER / "kdiffusion.json"
NOT_SCHEDULES = {"_recipe", "nll_cases"}
RELATIVE = 1e-12

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not FILE.is_file(), reason=f"no oracles at {FILE}; KD_ORACLES names them"),
]

ORACLE: Mapping[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {}
SCHEDULES = [
    pytest.param(schedule, int(n), entry, id=f"kdiffusion-{schedule}-n{n}")
    for schedule, entries in ORACLE.items()
    if schedule not in NOT_SCHEDULES
    for n, entry in entries.items()
]
STEPS = [
    pytest.param(schedule, int(n), int(m), entry, id=f"kdiffusion-{schedule}-n{n}-m{m}")
    for schedule, entries in ORACLE.items()
    if schedule not in NOT_SCHEDULES
    for n, held in entries.items()
    for m, entry in held["m"].items()
]
CASES = [
    pytest.param(case, id=f"kdiffusion-{case['kind']}-n{case['n']}-m{case['m']}-step{case['j']}")
    for case in ORACLE.get("nll_cases", {}).get("cases", [])
]


def ends(steps: ReverseSteps) -> tuple[Tensor, Tensor]:
    return steps.log_amplitude[:-1], steps.log_amplitude[1:]


QUANTITIES: Mapping[str, Callable[[ReverseSteps], Tensor]] = {
    "tau": lambda steps: steps.level.double(),
    "u": lambda steps: steps.posterior.u,
    "v": lambda steps: steps.posterior.v,
    "w": lambda steps: steps.posterior.w,
    "alpha": lambda steps: transition(*ends(steps))[0],
    "beta2": lambda steps: transition(*ends(steps))[1],
    "dsnr": lambda steps: signal_gain(*ends(steps)),
    "combination": lambda steps: rollout(steps.posterior)[-1],
    "combination_ddim": lambda steps: rollout(implicit_posterior(*ends(steps)))[-1],
}


def number(value: float | str | None) -> float:
    return float("inf") if value is None else float(value)


def check(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=RELATIVE, atol=0)


@pytest.mark.parametrize(("schedule", "n", "entry"), SCHEDULES)
def test_marginals(schedule: Any, n: int, entry: Mapping[str, Any]) -> None:
    assert set(entry) == {"marginals", "m"}
    log_amplitude = log_amplitudes(schedule, n)
    for k, expected in entry["marginals"].items():
        at = log_amplitude[int(k)]
        value = torch.stack([at.exp(), noise_variance(at)])
        check(value, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("schedule", "n", "m", "entry"), STEPS)
def test_steps(schedule: Any, n: int, m: int, entry: Mapping[str, Any] | None) -> None:
    if entry is None:  # the oracle's word for an invalid pair
        with pytest.raises(ValueError, match="number of steps must be from 1"):
            reverse_steps(schedule, m, num_levels=n)
        return
    steps = reverse_steps(schedule, m, num_levels=n)
    for name, expected in entry.items():
        values = torch.tensor([number(value) for value in expected], dtype=torch.float64)
        check(QUANTITIES[name](steps), values)


@pytest.mark.parametrize("case", CASES)
def test_likelihoods(case: Mapping[str, Any]) -> None:
    steps = reverse_steps(case["kind"], case["m"], num_levels=case["n"])
    j = case["j"] - 1
    (alpha, added), (u, v, w) = (
        (held[j] for held in law) for law in (transition(*ends(steps)), steps.posterior)
    )
    variance = w * case["sigma2"] + v**2 * case["delta2"]
    clean, estimate = case["x0"], case["x0hat"]
    expected = gaussian_nll(w * case["sigma2"] + v**2 * (clean - estimate) ** 2, variance)
    there = steps.amplitude[j] * clean + (steps.noise[j] * case["sigma2"]).sqrt() * case["eps_s"]
    here = alpha * there + (added * case["sigma2"]).sqrt() * case["eps_t"]
    sampled = gaussian_nll((there - u * here - v * estimate) ** 2, variance)
    for value, key in ((expected, "expected"), (sampled, "sampled")):
        check(value, torch.tensor(case[key], dtype=torch.float64))
