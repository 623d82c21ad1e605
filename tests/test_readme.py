"""The README's commands run, and what it shows is what they print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DATA = Path(os.environ.get("KD_DATA", ROOT.parent / "shared" / "data"))
BIN = Path(sys.executable).parent


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def section(name: str) -> str:
    """What stands between two markers of the README."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found is not None, name
    return found.group(1).strip()


@pytest.fixture
def clone(workdir: Path) -> Path:
    """The repository's configurations where the README's paths find them, and nothing made yet."""
    (workdir / "pipelines").symlink_to(ROOT / "pipelines")
    return workdir


def call(command: str, folder: Path, timeout: int) -> str:
    words = shlex.split(command.replace(".venv/bin/kd", str(BIN / "kd")))
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=timeout, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "a command that goes well says nothing on stderr"
    return done.stdout


def test_make_targets_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [command.removeprefix("make ") for command in commands() if "make " in command]
    assert targets == ["quickstart", "test"]
    for target in targets:
        assert f"\n{target}: .venv/installed" in makefile
    assert ".venv/bin/kd sweep pipelines/configs/sweeps/quickstart.yaml" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_quickstart_prints_what_the_readme_shows(clone: Path) -> None:
    command = ".venv/bin/kd sweep pipelines/configs/sweeps/quickstart.yaml"
    assert command in README
    printed = call(command, clone, timeout=230)
    # the numbers may differ in the last digit between processors; rows and their order do not
    shown = [
        line.split("│")[2].strip() for line in section("quickstart").splitlines() if "│" in line
    ]
    rows = [line.split("│")[2].strip() for line in printed.splitlines() if "│" in line]
    assert sorted(rows) == sorted(shown)
    assert "compare the runs: " in printed
    student = re.search(r"best student: (\S+)", printed)
    assert student is not None
    assert (clone / student.group(1)).is_file()


@pytest.mark.skipif(not DATA.is_dir(), reason="needs real CIFAR-10; KD_DATA names its folder")
@pytest.mark.parametrize("command", [line for line in commands() if "kd check" in line])
def test_the_real_pictures_of_the_readme_check(command: str, clone: Path) -> None:
    where = [
        f"--set data.root={DATA / 'cifar10'}",
        f"--set teacher.weights={DATA / 'teachers' / 'cifar10_resnet56.safetensors'}",
    ]
    assert "50000 pictures 3x32x32, 10 classes" in call(" ".join([command, *where]), clone, 120)


def test_every_kd_command_of_the_readme_names_what_exists() -> None:
    for command in commands():
        for word in command.split():
            if word.startswith("pipelines/"):
                assert (ROOT / word).is_file(), command


def test_the_losses_are_the_generated_table(clone: Path) -> None:
    assert section("losses") == call(".venv/bin/kd losses", clone, 60).strip()


def test_the_readme_is_short() -> None:
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", README, flags=re.DOTALL)
    assert len(prose.split()) < 700


def test_every_file_in_the_map_exists() -> None:
    names = re.findall(r"^\| (`[^|]+) \|", README[README.index("## Where things are") :], re.M)
    for row in names:
        first, *others = re.findall(r"`([^`]+)`", row)
        if first.startswith(("runs/", "mlruns")):
            continue
        for name in (first, *(str(Path(first).parent / other) for other in others)):
            assert (ROOT / name).exists(), name
