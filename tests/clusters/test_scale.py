"""The numbers of clusters/README.md are those of its script, and the script's those of the code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

CLUSTERS = Path(__file__).parents[2] / "clusters"


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", CLUSTERS / "scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scale", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_script_s_table(scale: ModuleType) -> None:
    assert "\n".join(scale.table()) in (CLUSTERS / "README.md").read_text()


def test_a_cache_has_view_0_of_all_and_the_others_of_what_is_trained_on(scale: ModuleType) -> None:
    toy = scale.Cache(pictures=400, views=2, classes=10, embedding=32, validation=0.2)
    assert toy.rows == 1040  # as tests/pipelines/test_cli.py reads in `kd cache --info`
    assert toy.logits_bytes == 1040 * 10 * 2
    assert toy.files == 2 * 3


def test_writes_are_counted_by_hand(scale: ModuleType) -> None:
    two = scale.Sweep(trials=2, epochs=3, at_once=1, epoch_seconds=1)
    assert two.writes == 2 * (1 + 2 + 3 + 1)  # a run, its parameters twice, epochs, the end
    assert two.writes_per_second == pytest.approx(14 / 6)
