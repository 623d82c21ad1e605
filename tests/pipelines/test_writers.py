"""Eight processes write to one store at once: nothing is lost, nothing is there twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.tracking import Tracker

WRITERS, EPOCHS, METRICS = 8, 4, 50
# Forks before anything is opened: the imports, which take seconds, are paid for once.
WRITE = """
import os, sys
from pipelines.tracking import Tracker

writers, epochs, metrics = map(int, sys.argv[2:])
children = []
for writer in range(writers):
    child = os.fork()
    if child == 0:
        run = Tracker(sys.argv[1]).start(f"writer-{writer}", params={}, tags={})
        for epoch in range(1, epochs + 1):
            names = range(metrics)
            run.log({f"m{n}": 1000.0 * writer + n + epoch / 10 for n in names}, epoch=epoch)
        run.end("FINISHED")
        sys.stdout.flush()
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""
POSTGRES = (
    "KD_POSTGRES names no empty database: `apt-get install postgresql`, `pip install "
    "psycopg2-binary`, `createdb kdsweep`, export KD_POSTGRES=postgresql://USER@HOST/kdsweep"
)


def check_writers(uri: str) -> None:
    Tracker(uri)  # makes the tables and the experiment before anyone races for them
    command = [sys.executable, "-W", "ignore", "-c", WRITE, uri]
    command += [str(number) for number in (WRITERS, EPOCHS, METRICS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    tracker = Tracker(uri)
    runs = {run.info.run_name: run for run in tracker.client.search_runs([tracker.experiment_id])}
    assert sorted(runs) == [f"writer-{writer}" for writer in range(WRITERS)]
    for writer in range(WRITERS):
        run = runs[f"writer-{writer}"]
        assert run.info.status == "FINISHED"
        assert len(run.data.metrics) == METRICS
        for n in range(METRICS):
            history = tracker.client.get_metric_history(run.info.run_id, f"m{n}")
            found = [(point.step, point.value) for point in history]
            expected = [(e, 1000.0 * writer + n + e / 10) for e in range(1, EPOCHS + 1)]
            assert sorted(found) == expected


def test_eight_writers_share_a_file_of_sqlite(workdir: Path) -> None:
    check_writers(f"sqlite:///{workdir}/mlruns.db")


@pytest.mark.skipif("KD_POSTGRES" not in os.environ, reason=POSTGRES)
def test_eight_writers_share_a_database_of_postgresql(workdir: Path) -> None:
    check_writers(os.environ["KD_POSTGRES"])
