"""Several teachers of one student: which are made ready, and who hears whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import jobs
from pipelines.config import RunConfig
from pipelines.loading import load
from pipelines.space import changed
from pipelines.tracking import Tracker


def watch(stage: str, done: int, total: int, note: str) -> None:
    pass


@pytest.fixture
def toy(toy_run: Path, workdir: Path) -> RunConfig:
    loaded = load(toy_run)
    assert isinstance(loaded, RunConfig)
    return loaded


def test_a_teacher_that_nobody_hears_is_not_made_ready(toy: RunConfig) -> None:
    control = changed(toy, {"losses.distill.weight": 0})
    inputs = jobs.prepared(control, watch=watch, tracker=Tracker())
    assert (dict(inputs.teachers), inputs.fingerprint) == ({}, "")
    assert not Path("runs").exists()
    assert not Path("caches").exists()
    with pytest.raises(ValueError, match="listens to teacher 'toy_teacher', which was not made re"):
        inputs.only(toy.heard)
