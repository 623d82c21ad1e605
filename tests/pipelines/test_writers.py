"""Eight processes write to one store at once: nothing is lost, nothing is there twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.tracking import Tracker
from tests.pipelines.servers import free_port, serving

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
    "KD_POSTGRES names no empty database: `apt-get install postgresql`, then, as root, "
    "`.ci/with_postgresql make test`, which starts a server and names one"
)


def check_writers(uri: str, *, store: str) -> None:
    """Write by ``uri``, then read the store behind it."""
    Tracker(uri)  # makes the tables and the experiment before anyone races for them
    command = [sys.executable, "-W", "ignore", "-c", WRITE, uri]
    command += [str(number) for number in (WRITERS, EPOCHS, METRICS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    tracker = Tracker(store)
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
    file = f"sqlite:///{workdir}/mlruns.db"
    check_writers(file, store=file)


@pytest.mark.skipif("KD_POSTGRES" not in os.environ, reason=POSTGRES)
def test_eight_writers_share_a_tracking_server_on_postgresql(workdir: Path) -> None:
    server = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--backend-store-uri", os.environ["KD_POSTGRES"]]
    command += ["--host", "127.0.0.1", "--port", server.rpartition(":")[2]]
    with serving(command, f"{server}/health", cwd=workdir):
        check_writers(server, store=os.environ["KD_POSTGRES"])
