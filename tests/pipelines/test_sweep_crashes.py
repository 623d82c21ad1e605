"""A sweep that is killed goes on where it was, and its table is the undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import sweep as sweeps
from pipelines.loop import STATE
from pipelines.ranking import OUTCOME
from pipelines.space import SweepConfig
from pipelines.strict import validated
from pipelines.train import RESULT

RUN: dict[str, Any] = {
    "student": {"name": "convnet", "params": {"width": 4}},
    "data": {"name": "digits", "limit": 400, "validation": 0.2},
    "epochs": 8,
    "batch_size": 32,
    "optimizer": {"lr": 0.05},
    "losses": {"ce": {}},
}
SWEEP: dict[str, Any] = {
    "base": RUN,
    "space": {"losses.ce.params.label_smoothing": {"grid": [0.0, 0.1, 0.2]}},
    "seeds": 2,
    "search": {"max_concurrent": 2},
}
Told = Callable[[], bool]


def kd(*words: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipelines", *words]
    return subprocess.Popen(
        command,
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def kill_when(process: subprocess.Popen[bytes], ready: Told) -> None:
    """Kill the driver outright at the first moment that is ready; Ray's own processes follow."""
    while process.poll() is None and not ready():
        try:
            process.wait(timeout=0.05)  # a poll of its files, not a guess of its speed
        except subprocess.TimeoutExpired:
            continue
    assert process.poll() is None, "the sweep ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def finished_runs(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob(f"runs/*/{RESULT}")}


def ranking(folder: Path) -> list[Any]:
    (file,) = folder.glob(f"runs/sweeps/*/{OUTCOME}")
    return [(row["label"], row["values"]) for row in json.loads(file.read_text())["rows"]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_sweep_loses_no_trial_and_runs_none_twice(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("undisturbed", "killed")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "toy.yaml").write_text(yaml.safe_dump(SWEEP))
    whole = kd("sweep", "toy.yaml", folder=folders["undisturbed"])
    assert whole.wait() == 0, whole.stdout and whole.stdout.read().decode()
    killed = folders["killed"]
    moments: list[Told] = [
        lambda: bool(list(killed.glob("runs/sweeps/*/sweep.json"))),  # before the first trial
        lambda: bool(list(killed.glob(f"runs/*/{STATE}"))),  # in the middle of the first ones
        lambda: len(finished_runs(killed)) >= 3,  # between trials
    ]
    kept: dict[str, int] = {}
    for number, moment in enumerate(moments):
        words = ("--resume", "toy") if number else ("toy.yaml",)
        kill_when(kd("sweep", *words, folder=killed), moment)
        kept |= finished_runs(killed)
    last = kd("sweep", "--resume", "toy", folder=killed)
    assert last.wait() == 0, last.stdout and last.stdout.read().decode()
    assert ranking(killed) == ranking(folders["undisturbed"])
    assert len(finished_runs(killed)) == 6
    assert {name: finished_runs(killed)[name] for name in kept} == kept


def test_a_sweep_is_found_by_its_name_and_an_unknown_one_is_not(workdir: Path) -> None:
    config = validated(SweepConfig, {"name": "toy", **SWEEP}, where="toy")
    folder = sweeps.begun(config)
    for name in ("toy", folder.name, str(folder.absolute())):
        assert sweeps.begun_sweep(name) == config
    with pytest.raises(ValueError, match=rf"one sweep 'toi' in .* there are: {folder.name}"):
        sweeps.begun_sweep("toi")
    other = config.model_copy(update={"seeds": 3})
    sweeps.begun(other)
    with pytest.raises(ValueError, match=r"expected one sweep 'toy' .* toy-\w+, toy-\w+"):
        sweeps.begun_sweep("toy")
