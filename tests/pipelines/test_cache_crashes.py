"""Whoever is killed while a cache is written, the same call completes it: exactly, and no more."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from pipelines.cache.inspection import damaged_files
from pipelines.cache.manifest import is_complete, marker
from tests.pipelines.caches import (
    ROWS_PER_CRASH_FILE,
    columns_for,
    crash_run,
    files_of,
    rows_of_views,
    store_of,
    write,
    written_here,
)

pytestmark = pytest.mark.timeout(580)
ROOT = Path(__file__).parents[2]
ROWS, NUM_FILES = 400 + 2 * 320, (10 + 2 * 8) * 3
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))]
Standing = dict[str, int]  # when each file was written


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process itself writes."""
    monkeypatch.setattr("pipelines.cache.write.written", written_here)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.cache.write.written", written_here)
        write(crash_run(str(folder)), rows_per_file=ROWS_PER_CRASH_FILE)
    return folder


def started(module: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.pipelines.{module}", *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def snapshots(output: str) -> list[Standing]:
    """What stood in the cache, each time that it was printed; Ray may print other lines."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def check_exact(folder: Path, undisturbed: Path, *, before: Standing) -> None:
    """Every file is that of an undisturbed write, and what stood before was not written again."""
    run, reference = crash_run(str(folder)), crash_run(str(undisturbed))
    store = store_of(run)
    after = files_of(Path(store.root))
    assert len(after) == NUM_FILES
    assert {name: after[name] for name in before} == before
    assert is_complete(store, columns_for(run), run.data.views)
    for column in columns_for(run):
        for view, rows in enumerate(rows_of_views(run)):
            held = marker(store, column.folder, view)
            assert held == marker(store_of(reference), column.folder, view)
            assert sum(file["rows"] for file in (held or {}).values()) == len(rows)
    assert damaged_files(store) == []
    assert not list(folder.glob("**/.part-*")), "what has half arrived was left"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_writer_killed_at_any_line_loses_nothing_that_stands(
    tmp_path: Path, undisturbed: Path, seed: int
) -> None:
    output, errors = started("die_writing", str(tmp_path), str(seed)).communicate()
    stood = snapshots(output)
    assert len({len(files) for files in stood}) > 10, errors  # deaths with more and more files
    for earlier, later in pairwise(stood):
        assert earlier.items() <= later.items()
    check_exact(tmp_path, undisturbed, before=stood[-2])


# each starts a Ray of its own, which takes 20 s
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "actor", "node"])
@pytest.mark.parametrize("seed", range(4))
def test_whoever_is_killed_the_cache_is_that_of_an_undisturbed_write(
    tmp_path: Path, undisturbed: Path, victim: str, seed: int
) -> None:
    rows = random.Random(f"{victim} {seed}").randrange(1, ROWS * 3 // 4)
    process = started("fill_cache", str(tmp_path), victim, str(rows))
    output, errors = process.communicate()
    (stood,) = snapshots(output) or [{}]
    assert 0 < len(stood) < NUM_FILES, errors
    if victim == "driver":
        # at once: its actors may be still at work, until Ray sees that their driver has gone
        assert process.returncode == -signal.SIGKILL, errors
        write(crash_run(str(tmp_path)), rows_per_file=ROWS_PER_CRASH_FILE)
    else:
        assert process.returncode == 0, errors
    check_exact(tmp_path, undisturbed, before=stood)


def test_of_two_processes_one_writes_and_the_other_waits_for_it(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = started("fill_cache", str(tmp_path), "nobody", "1")
    assert first.stdin is not None
    assert first.stdout is not None
    # it has written something, and goes on when it is told to
    (stood,) = snapshots(first.stdout.readline())
    assert 0 < len(stood) < NUM_FILES
    notes = []

    def told(done: int, total: int, note: str) -> None:
        if note and not notes:
            first.stdin.write("\n")
            first.stdin.flush()
        notes.append((done, note))

    write(crash_run(str(tmp_path)), watch=told, rows_per_file=ROWS_PER_CRASH_FILE)
    _, errors = first.communicate()
    assert first.returncode == 0, errors
    assert {*notes[:-1]} == {(0, "written by another process")}
    assert notes[-1] == (ROWS, ""), "it found all that it would have written"
    check_exact(tmp_path, undisturbed, before=stood)
