"""``kd fuse``: the student of a finished run as its plain network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pipelines import cli
from pipelines.build import build_student
from pipelines.config import RunConfig
from pipelines.fused import fuse_checkpoint
from pipelines.loop import Metrics
from pipelines.models import build_network, load_weights
from pipelines.networks import ModelConfig
from pipelines.sources import read_pictures
from pipelines.strict import validated
from pipelines.train import Finished, Inputs, train_here

BASE: dict[str, Any] = {
    "student": {"name": "resnet8", "params": {"width": 4}},
    "data": {"name": "digits", "limit": 200, "validation": 0.5},
    "epochs": 1,
    "batch_size": 50,
    "losses": {"ce": {}},
}
BRANCHES = {"stages": ["layer2", "layer3"], "count": 3, "kinds": ["same", "1x1", "average"]}


def trained(branches: dict[str, Any] | None, **changes: Any) -> tuple[RunConfig, Finished]:
    def no_word(metrics: Metrics) -> None:
        pass

    student = {**BASE["student"], "branches": branches}
    run = validated(RunConfig, {**BASE, "student": student, **changes}, where="toy")
    return run, train_here(run, Inputs(read_pictures(run.data, "train")), no_word)


@pytest.fixture(autouse=True)
def folder(workdir: Path) -> Path:
    return workdir


@pytest.mark.parametrize("names_file", [False, True])
def test_the_written_student_is_the_trained_one_in_its_plain_network(names_file: bool) -> None:
    run, result = trained({**BRANCHES, "stages": ["layer3"]})
    checkpoint = result.weights if names_file else result.folder
    shown = CliRunner().invoke(cli.app, ["fuse", str(checkpoint)])
    assert shown.exit_code == 0, shown.output
    assert "the same predictions for 100 validation pictures" in shown.output
    written = yaml.safe_load((result.folder / "fused/student.yaml").read_text())
    assert written["fused_from"] == run.folder.name
    model = ModelConfig(**written["teacher"])
    sizes = {name: written[name] for name in ("num_classes", "in_channels")}
    plain = build_network(model, **sizes).eval()
    branched = build_student(run, read_pictures(run.data, "train")).net
    load_weights(branched, result.weights)
    image = torch.randn(8, 1, 8, 8)
    torch.testing.assert_close(plain(image), branched.eval()(image))


def test_a_run_is_fused_where_it_lies(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, result = trained({**BRANCHES, "stages": ["layer3"]})
    moved = tmp_path_factory.mktemp("elsewhere") / "run"
    result.folder.absolute().rename(moved)
    monkeypatch.chdir(tmp_path_factory.mktemp("nowhere"))
    assert fuse_checkpoint(moved).folder == moved / "fused"
    with pytest.raises(ValueError, match=r"expected a run's folder or its best\.safetensors"):
        fuse_checkpoint(moved / "last.safetensors")


def test_a_run_without_branches_has_nothing_to_fuse() -> None:
    _, result = trained(None)
    with pytest.raises(ValueError, match="a student without branches: nothing to fuse"):
        fuse_checkpoint(result.folder)


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished run in"):
        fuse_checkpoint(tmp_path)


def test_a_bias_that_the_plain_network_lacks_is_named_and_nothing_is_written() -> None:
    student = {"name": "wrn_16_1", "branches": {"stages": ["block3"], "batch_norm": True}}
    _, result = trained(None, student=student)
    with pytest.raises(ValueError, match=r"the fused student has .*bias, which the plain wrn"):
        fuse_checkpoint(result.folder)
    assert not (result.folder / "fused").exists()


def test_a_student_that_fuses_to_another_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    _, result = trained(BRANCHES)

    def other(net: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(9)
        model = ModelConfig(**BASE["student"])
        return build_network(model, num_classes=10, in_channels=1).eval()

    monkeypatch.setattr("pipelines.fused.as_used", other)
    with pytest.raises(ValueError, match=r"differs by .* predictions; nothing is written"):
        fuse_checkpoint(result.folder)
    assert not (result.folder / "fused").exists()
