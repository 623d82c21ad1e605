"""The batch script, with srun, scontrol and ray replaced by what writes down how it was called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from signal import SIGTERM, SIGUSR1, Signals

import pytest

SCRIPT = Path(__file__).parents[2] / "clusters" / "slurm" / "ray.sbatch"
SHELL = ["bash", str(SCRIPT)]
# srun: which node, then the command itself here; ray runs until it is ended
STUBS = {
    "srun": """
        while [[ $1 == --* ]]; do
          if [[ $1 == --nodelist=* ]]; then node=${1#--nodelist=}; fi
          shift
        done
        echo "$node: $*" >>calls
        [[ $1 == ray ]] && echo "$RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH")" >>modes
        exec "$@"
    """,
    "scontrol": """
        if [[ $1 == requeue ]]; then echo "$*" >requeued; else printf 'one\\ntwo\\nthree\\n'; fi
    """,
    "hostname": "echo 10.0.0.1 fe80::1",
    "ray": "exec tail --pid=$PPID -f /dev/null",
    "python": "cat >/dev/null",
    "endless": """
        trap 'pgrep -f "[t]ail --pid" >/dev/null && echo Ray >told_beside; exit 143' TERM
        echo >begun; while :; do sleep 0.05; done
    """,
    "work": 'echo "$RAY_ADDRESS" >address; exit "${1:-0}"',
}


@pytest.fixture
def allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An allocation of three nodes, in whose folder the stubs write."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, body in STUBS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    settings = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "[one-three]"}
    for name, value in (settings | {"SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "2"}).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SHELL, *words], cwd=folder, capture_output=True, text=True, timeout=60)


def test_bash_can_read_the_script() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=60)


def test_one_ray_spans_the_allocation_and_the_command_finds_it(allocation: Path) -> None:
    done = run(allocation, "work", "0")
    assert done.returncode == 0, done.stderr
    calls = sorted((allocation / "calls").read_text().splitlines())
    started = {line.partition(":")[0]: line for line in calls if "ray start" in line}
    assert set(started) == {"one", "two", "three"}
    assert "--head" in started["one"]
    assert "--dashboard-host=127.0.0.1" in started["one"]
    for node in ("two", "three"):
        assert "--address=10.0.0.1:6745" in started[node]  # 6400 + 12345 % 1000
    assert all("--num-cpus=8 --num-gpus=2" in line for line in started.values())
    assert "one: work 0" in calls
    assert (allocation / "address").read_text().strip() == "10.0.0.1:6745"


def test_the_token_is_for_the_owner_alone_and_gone_after_the_job(allocation: Path) -> None:
    run(allocation, "work", "0")
    assert set((allocation / "modes").read_text().splitlines()) == {"token 600"}
    assert not list(allocation.glob(".ray-*"))
    assert "token" not in (allocation / "calls").read_text(), "a token in a command line"


def test_the_job_ends_as_its_command_does(allocation: Path) -> None:
    assert run(allocation, "work", "3").returncode == 3
    assert run(allocation).returncode == 2


@pytest.mark.parametrize(("said", "is_requeued"), [(SIGUSR1, True), (SIGTERM, False)])
def test_a_job_at_the_end_of_its_time_tells_its_command_and_is_queued_again(
    allocation: Path, said: Signals, is_requeued: bool
) -> None:
    script = subprocess.Popen([*SHELL, "endless"], cwd=allocation)
    while not (allocation / "begun").exists():
        assert script.poll() is None
    script.send_signal(said)
    assert script.wait(timeout=30) == 143
    assert (allocation / "told_beside").exists(), "it was told after Ray had ended"
    assert (allocation / "requeued").exists() == is_requeued
    assert not list(allocation.glob(".ray-*"))
