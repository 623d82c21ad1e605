"""What a user sees: the commands, and one clear line for every mistake."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from kdcore.models import convnet
from pipelines.cli import app
from tests.pipelines.servers import free_port, serving

COMMANDS = [
    *("check", "cache", "train", "sweep", "report", "synthesize"),
    *("evaluate", "losses", "submit", "ui"),
]
Kd = Callable[..., Result]


@pytest.fixture
def kd(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Kd:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(kd: Kd, command: str) -> None:
    result = kd(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_the_program_runs_as_a_module_too() -> None:
    command = [sys.executable, "-m", "pipelines", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


def weights(folder: Path) -> Path:
    path = folder / "wide.safetensors"
    save_file(convnet(10, 1, width=9).state_dict(), path)
    return path


def bad_picture(folder: Path) -> Path:
    image = [{"bytes": b"not a picture", "path": None}]
    pq.write_table(pa.table({"image": image, "label": [0]}), folder / "train-0.parquet")
    return folder


ALONE = ["teacher=null", "losses={ce: {}}"]  # a teacher's run must share the data

MISTAKES: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "a key that does not exist": (
        lambda folder: ["epoch=3"],
        ["toy.yaml", "unknown key 'epoch'", "did you mean 'epochs'?"],
    ),
    "an unknown loss": (
        lambda folder: ["losses.distill.loss=w3"],
        ["losses.distill", "unknown loss 'w3'", "did you mean 'w2'?"],
    ),
    "a typo in a loss's parameters": (
        lambda folder: ["losses.distill.params={temprature: 2}"],
        ["losses.distill", "params: unknown key 'temprature'", "did you mean 'temperature'?"],
    ),
    "a student layer that does not exist": (
        lambda folder: ["losses.mid={loss: mse, layers: {blok2: block2}}"],
        ["student", "unknown layer", "'blok2'", "did you mean 'block2'?"],
    ),
    "a teacher layer that does not exist": (
        lambda folder: ["losses.mid={loss: mse, layers: {block2: blok2}}"],
        ["teacher", "unknown layer", "'blok2'", "did you mean 'block2'?"],
    ),
    "layers that cannot be compared": (
        lambda folder: ["losses.mid={loss: mse, layers: {block2: embedding}}"],
        ["losses.mid", "'block2': 'embedding'", "(2, 8, 4, 4)", "(2, 32)"],
    ),
    "weights of another network": (
        lambda folder: [f"teacher={{name: convnet, weights: {weights(folder)}}}"],
        ["teacher", "wide.safetensors", "(9, 1, 3, 3)", "expected (16, 1, 3, 3)"],
    ),
    "weights that are not there": (
        lambda folder: ["teacher={name: convnet, weights: no.safetensors}"],
        ["teacher", "no weights at no.safetensors"],
    ),
    "a picture that cannot be decoded": (
        lambda folder: [*ALONE, "data.name=parquet", f"data.root={bad_picture(folder)}"],
        ["train-0.parquet row 0", "cannot be decoded"],
    ),
    "a data set that does not exist": (
        lambda folder: [*ALONE, "data.name=digit"],
        ["unknown dataset 'digit'", "did you mean 'digits'?"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("command", ["check", "train", "sweep"])
def test_a_mistake_is_one_line_that_names_place_found_and_expected(
    kd: Kd, command: str, mistake: str, toy_run: Path, workdir: Path
) -> None:
    changes, named = MISTAKES[mistake]
    words = [word for change in changes(workdir) for word in ("--set", change)]
    result = kd(command, toy_run, *words)
    assert result.exit_code == 2
    assert all(name in result.stderr for name in named), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert not (workdir / "runs").exists(), "something was trained before the mistake was told"


def test_a_cache_of_another_teacher_is_refused_before_training(
    kd: Kd, toy_run: Path, workdir: Path, local_ray: None
) -> None:
    assert kd("cache", toy_run).exit_code == 0
    (folder,) = (workdir / "caches").iterdir()
    result = kd("train", toy_run, "--set", f"caches={folder}", "--set", "teacher.run.seed=1")
    assert result.exit_code == 2
    assert "is not of this run: teacher is {" in result.stderr
    assert f"run `kd cache RUN.yaml --set caches={folder.parent}`" in result.stderr
    deeper = ("losses.distill.loss=at", "losses.distill.layers={block2: block2}")
    words = [word for change in (f"caches={folder}", *deeper) for word in ("--set", change)]
    assert kd("cache", toy_run, *words).exit_code == 0
    assert sorted(path.name for path in (folder / "layers").iterdir()) == ["block2", "embedding"]
    trained = {path.name.rpartition("-")[0] for path in (workdir / "runs").iterdir()}
    assert trained == {"toy_teacher"}


def test_a_cache_is_told_of_checked_and_cleaned_up(
    kd: Kd, toy_run: Path, workdir: Path, local_ray: None
) -> None:
    assert kd("cache", toy_run, "--verify").exit_code == 2
    assert kd("cache", toy_run).exit_code == 0
    (folder,) = (workdir / "caches").iterdir()
    told = kd("cache", toy_run, "--info")
    assert told.exit_code == 0
    assert folder.name in told.stdout
    assert "1,040" in told.stdout
    assert kd("cache", toy_run, "--verify").exit_code == 0
    file = folder / "logits" / "view=0001" / "part-00000.parquet"
    file.write_bytes(file.read_bytes() + b"more")
    result = kd("cache", toy_run, "--verify")
    assert result.exit_code == 1
    assert f"{file} is gone or has changed" in result.stdout
    assert "nothing" in kd("cache", toy_run, "--prune").stdout
    (file.parent / "_SUCCESS").unlink()
    assert f"removed {file.parent}" in kd("cache", toy_run, "--prune").stdout


def test_debug_shows_the_traceback(kd: Kd, toy_run: Path) -> None:
    result = kd("check", toy_run, "--set", "epoch=3", "--debug")
    assert isinstance(result.exception, ValueError)


def test_check_lists_the_pictures_that_are_left_out(kd: Kd, workdir: Path) -> None:
    for label, count in (("cat", 5), ("dog", 4)):
        folder = workdir / "pictures" / "train" / label
        folder.mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    (workdir / "pictures" / "train" / "dog" / "4.png").write_bytes(b"no picture")
    data = {"name": "folder", "root": "pictures", "on_bad_image": "skip", "validation": 0.5}
    run = {"student": {"name": "convnet"}, "data": data, "epochs": 1, "batch_size": 2}
    Path("run.yaml").write_text(yaml.safe_dump(run | {"losses": {"ce": {}}}))
    result = kd("check", Path("run.yaml"))
    assert "9 pictures 1x8x8, 2 classes" in result.stdout
    assert "skipped pictures/train/dog/4.png: a picture that cannot be decoded" in result.stdout


def test_check_says_what_would_be_trained(kd: Kd, toy_run: Path, workdir: Path) -> None:
    result = kd("check", toy_run)
    assert result.exit_code == 0
    assert "400 pictures 1x8x8, 10 classes" in result.stdout
    assert "distill: 0.9 x kd {'temperature': 4.0}" in result.stdout
    assert not (workdir / "runs").exists()


def test_train_evaluate_and_again(kd: Kd, toy_run: Path, workdir: Path, local_ray: None) -> None:
    early = kd("evaluate", toy_run)
    assert early.exit_code == 2
    assert "has not been trained" in early.stderr
    # as wide as its teacher, so that there is a plane for both
    toy = (toy_run, "--set", "student.params.width=8")
    first = kd("train", *toy)
    assert first.exit_code == 0
    student = next(line for line in first.stdout.splitlines() if line.startswith("student: "))
    assert (workdir / student.removeprefix("student: ")).is_file()
    folder = (workdir / student.removeprefix("student: ")).parent
    assert {path.name for path in folder.glob("*.png")} == {"curves.png", "embedding.png"}
    again = kd("train", *toy)
    assert "found finished in" in again.stdout
    assert student in again.stdout
    evaluated = kd("evaluate", *toy)
    assert evaluated.exit_code == 0
    names = dict(line.split() for line in evaluated.stdout.splitlines())
    assert set(names) == {"test/top1", "test/nll", "test/calibration_error"}
    assert 0 <= float(names["test/top1"]) <= 1


def test_a_live_teacher_needs_no_cache(kd: Kd, toy_run: Path, workdir: Path) -> None:
    result = kd("train", toy_run, "--set", "teacher.source=live")
    assert result.exit_code == 0, result.stderr
    assert not (workdir / "caches").exists()


def test_a_sweep_ends_with_table_student_and_the_way_to_the_ui(
    kd: Kd, toy_run: Path, workdir: Path, local_ray: None
) -> None:
    path = workdir / "two.yaml"
    space = {"losses.distill.weight": {"grid": [0, 1]}}
    path.write_text(yaml.safe_dump({"base": str(toy_run), "space": space}))
    result = kd("sweep", path, "--set", "epochs=1")
    assert result.exit_code == 0, result.stderr
    for words in ("no distillation (control)", "weight=1", "teacher", "best student: ", "kd ui"):
        assert words in result.stdout, words
    assert kd("evaluate", path, "--set", "epochs=1").exit_code == 0
    (folder,) = (workdir / "runs" / "sweeps").iterdir()
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    told = kd("report", path, "--set", "epochs=1")
    assert "report.html, with" in told.stdout, told.stderr
    assert (folder / "report.html").read_bytes() == before
    assert kd("report", folder).exit_code == 0
    assert kd("report", path).exit_code == 2, "a sweep of other epochs has not been run"


def test_the_losses_are_listed_with_what_they_compare(kd: Kd) -> None:
    result = kd("losses")
    assert result.exit_code == 0
    assert "| `w2` | features | teacher | whole batch |" in result.stdout


@pytest.mark.slow
def test_the_ui_answers_on_this_machine(workdir: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "pipelines", "ui", "--port", str(port)]
    with serving(command, f"http://127.0.0.1:{port}/health", cwd=workdir):
        pass
