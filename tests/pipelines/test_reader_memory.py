"""What readers take: from files little, whatever there is; from memory one copy for all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from pipelines.data import Reader, TeacherRows
from pipelines.sources import Pictures
from pipelines.train import Inputs, Teacher
from tests.pipelines.caches import toy

ROOT = Path(__file__).parents[2]
CAP = 32 * 2**20
TRIALS, COUNT, CLASSES = 3, 20_000, 100


def test_more_rows_than_the_memory_that_there_is_are_read_from_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.pipelines.read_spool", str(tmp_path), "60000", str(CAP)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    on_disk, _ = map(int, done.stdout.split())
    assert on_disk > 2 * CAP


# --- one copy for all trials ------------------------------------------------------------------


def inputs() -> Inputs:
    drawn = np.random.default_rng(0)
    pictures = Pictures(
        drawn.integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8),
        drawn.integers(0, CLASSES, COUNT),
        CLASSES,
    )
    logits = [drawn.standard_normal((COUNT, CLASSES)).astype(np.float16) for _ in range(3)]
    return Inputs(pictures, {"teacher": Teacher(Path("none"), rows=TeacherRows(logits, {}))})


class Trial:
    """A trial that has read every row and still holds them."""

    def __init__(self, references: list[Any]) -> None:
        self.before = self.taken()
        self.inputs: Inputs = ray.get(references[0])
        reader = Reader(toy(), self.inputs.pictures, self.inputs.rows)
        for epoch in range(2):
            for _ in reader.train(epoch):
                pass

    def taken(self) -> dict[str, int]:
        """Bytes of this process: of shared memory its own share and all that it sees."""
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        held = {words[0].rstrip(":"): 1024 * int(words[1]) for words in map(str.split, lines)}
        return {name: held[name] for name in ("Pss_Shmem", "Pss_Anon")}

    def grown(self) -> dict[str, int]:
        return {name: value - self.before[name] for name, value in self.taken().items()}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="not Linux")
def test_the_trials_of_a_node_share_one_copy(local_ray: None) -> None:
    held = inputs()
    teacher = held.rows["teacher"]
    size = held.pictures.image.nbytes + sum(np.asarray(view).nbytes for view in teacher.logits)
    reference = ray.put(held)
    trials = [ray.remote(num_cpus=1)(Trial).remote([reference]) for _ in range(TRIALS)]
    ray.get([trial.grown.remote() for trial in trials])  # until every one has read all rows
    grown = ray.get([trial.grown.remote() for trial in trials])
    shared = sum(one["Pss_Shmem"] for one in grown)
    # the store itself has mapped it too, and so has the driver in part
    assert TRIALS / (TRIALS + 2) * size * 0.9 < shared < 1.1 * size, grown
    # a copy of one's own would be all of it
    assert max(one["Pss_Anon"] for one in grown) < size / 2, grown
    for trial in trials:
        ray.kill(trial)
