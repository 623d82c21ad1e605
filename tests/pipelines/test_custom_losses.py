"""A loss from elsewhere: named as module:attr, run only where the run says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
from kdcore.taps import EMBEDDING
from pipelines.build import build_teacher
from pipelines.config import RunConfig
from pipelines.custom_losses import code_identity
from pipelines.digests import plain
from pipelines.loading import load
from pipelines.loop import Metrics
from pipelines.sources import read_pictures
from pipelines.space import SweepConfig, changed, override
from pipelines.strict import validated
from pipelines.train import RESULT, Inputs, Teacher, train_here
from tests.pipelines.test_train import no_word
from tests.timeless import timeless

LOSS = "brought.losses:distance"
MODULE = '''
"""Counts its imports by a file."""
from pathlib import Path

from torch import Tensor

from kdcore.losses import Logits
from kdcore.losses.logits import kd

with Path(__file__).with_suffix(".imported").open("a") as imports:
    imports.write("x")


def squared(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    return (student - teacher).abs().pow(power).mean()


distance = Logits(squared, weight=3.0)
same = Logits(kd, weight=0.9)
'''
TOY: dict[str, Any] = {
    "student": {"name": "convnet", "params": {"width": 2}},
    "teacher": {"name": "resnet8", "weights": "teacher.safetensors"},
    "data": {"name": "digits"},
    "epochs": 2,
    "losses": {"ce": {}, "mine": {"loss": LOSS}},
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package on the path, of which this process knows nothing before and after."""
    folder = tmp_path / "path" / "brought"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "losses.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder.parent)
    code_identity.cache_clear()
    yield folder
    for name in ("brought", "brought.losses", "brought.bad"):
        sys.modules.pop(name, None)


def imports(package: Path) -> int:
    file = package / "losses.imported"
    return len(file.read_text()) if file.exists() else 0


def run_of(**changes: Any) -> RunConfig:
    content = {**deepcopy(TOY), "allow_custom_losses": True, **changes}
    return validated(RunConfig, content, where="toy.yaml")


def test_it_is_a_loss_like_any_other_where_it_is_allowed(package: Path) -> None:
    term = run_of().losses["mine"]
    assert (term.weight, term.params) == (3.0, {"power": 2.0})
    assert run_of().is_taught
    with pytest.raises(ValueError, match=r"unknown key 'powr'.*'power'"):
        run_of(losses={"mine": {"loss": LOSS, "params": {"powr": 1}}})


@pytest.mark.parametrize("allowed", [{}, {"allow_custom_losses": False}])
def test_without_the_word_nothing_is_imported(package: Path, allowed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^toy.yaml: losses: mine: .*allow_custom_losses: true"):
        validated(RunConfig, {**deepcopy(TOY), **allowed}, where="toy.yaml")
    assert imports(package) == 0
    assert "brought" not in sys.modules


@pytest.mark.parametrize(
    "content",
    [
        {"base": TOY},
        {"base": {**TOY, "losses": {"ce": {}}}, "space": {"losses.ce.loss": {"grid": [LOSS]}}},
        {
            "base": {**TOY, "losses": {"ce": {}}},
            "space": {"allow_custom_losses": {"grid": [True]}},
        },
        {"base": {**TOY, "losses": {"ce": {}}}, "variants": {"mine": {"losses.mine.loss": LOSS}}},
    ],
)
def test_a_sweep_cannot_bring_what_its_base_does_not_allow(
    package: Path, content: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="allow_custom_losses"):
        validated(SweepConfig, content, where="toy.yaml")
    assert imports(package) == 0


def test_a_teacher_s_run_has_a_word_of_its_own(package: Path) -> None:
    theirs = {key: value for key, value in TOY.items() if key != "teacher"}
    theirs["losses"] = {"ce": {}, "mine": {"loss": LOSS}}
    with pytest.raises(ValueError, match=r"teacher.*allow_custom_losses"):
        run_of(teacher={"run": theirs}, losses={"ce": {}})
    assert imports(package) == 0


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("brought.losses:squared", r"of type function, expected a line such as LOSSES has"),
        ("brought.losses:Logits", r"of type ABCMeta, expected a line"),
        ("os:mkdir", r"of type builtin_function_or_method, expected a line"),
        ("brought.losses:far", r"brought.losses has no 'far'"),
        ("brought.nothing:far", r"cannot be imported \(ModuleNotFoundError.*on every node"),
        ("brought.bad:it", r"cannot be imported \(ZeroDivisionError"),
        (":it", r"cannot be imported"),
        ("brought.losses:", r"has no ''"),
    ],
)
def test_what_is_no_line_is_refused_by_a_sentence(package: Path, loss: str, words: str) -> None:
    (package / "bad.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=rf"losses.mine: loss '{loss}'.*{words}"):
        run_of(losses={"mine": {"loss": loss}})


def test_another_source_makes_another_run_and_the_word_alone_does_not(package: Path) -> None:
    first = run_of().identity
    assert run_of().identity == first
    (package / "losses.py").write_text(MODULE + "\n# changed\n")
    code_identity.cache_clear()
    assert run_of().identity != first
    plainly = {"losses": {"ce": {}}, "teacher": None}
    assert run_of(**plainly).identity == run_of(**plainly, allow_custom_losses=False).identity


def test_a_distribution_counts_by_its_version_too() -> None:
    assert set(code_identity("jaxtyping:Float")) == {"source", "jaxtyping"}


def test_a_change_of_the_loss_drops_what_it_does_not_take(package: Path) -> None:
    run = run_of(losses={"mine": {"loss": "kd", "params": {"temperature": 8}}})
    mine = changed(run, {"losses.mine.loss": LOSS}).losses["mine"]
    assert (mine.params, mine.weight) == ({"power": 2.0}, 3.0)
    content = plain(run_of()) | {"allow_custom_losses": False}
    assert override(content, "losses.mine.loss", "brought.other:it")["losses"]["mine"]["params"]


def history_of(run: RunConfig) -> list[Metrics]:
    pictures = read_pictures(run.data, "train")
    live = build_teacher(run.teachers["toy_teacher"], pictures, [EMBEDDING])
    inputs = Inputs(pictures, {"toy_teacher": Teacher(Path(), live=live)})
    history = train_here(run, inputs, no_word).history
    return [timeless(metrics) for metrics in history]


def test_a_student_learns_from_it_what_it_learns_from_the_same_of_ours(
    package: Path, toy_run: Path, workdir: Path
) -> None:
    ours = load(toy_run, ["teacher.source=live", "data.views=0", "data.augment={}"])
    assert isinstance(ours, RunConfig)
    brought = {"allow_custom_losses": True, "losses.distill.loss": "brought.losses:same"}
    theirs = changed(ours, brought)
    assert theirs.identity != ours.identity
    torch.manual_seed(0)
    expected = history_of(ours)
    torch.manual_seed(0)
    assert history_of(theirs) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_actors_of_a_cluster_find_it_too(package: Path, toy_run: Path, workdir: Path) -> None:
    words = ["losses.distill.loss=brought.losses:same", "allow_custom_losses=true", "workers=2"]
    command = [sys.executable, "-m", "pipelines", "train", str(toy_run)]
    for word in [*words, "teacher.source=live"]:
        command += ["--set", word]
    path = f"{package.parent}:{Path(pipelines.__file__).parents[1]}"
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (result,) = workdir.glob(f"runs/toy-*/{RESULT}")
    assert len(json.loads(result.read_text())["history"]) == 2
    assert imports(package) >= 3, "the driver and two workers"
