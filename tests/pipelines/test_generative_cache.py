"""A teacher's runs in a cache: written, read, verified, and what a student makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from kdcore.dgm.trace import Trace
from pipelines.cache.columns import SAMPLE, TRACE
from pipelines.cache.inspection import inspected, prune
from pipelines.cache.manifest import DONE, view_folder
from pipelines.cli import app
from pipelines.digests import plain
from pipelines.generative import cache as written
from pipelines.generative.batches import Batches
from pipelines.generative.cache import TraceCache
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.inputs import GenerativeInputs, step_of
from pipelines.generative.jobs import cache_faults, prepared, train
from pipelines.generative.models import build_model, load_model
from pipelines.generative.traces import run_of_rows
from pipelines.loop import Metrics
from pipelines.models import save_weights
from pipelines.parquet import read_parquet
from pipelines.strict import validated
from pipelines.tracking import Tracker
from tests.pipelines.generative_toys import GOING_ON, STUDENTS

CPU = torch.device("cpu")


def watch(*told: Any) -> None:
    pass


def no_word(metrics: Metrics) -> None:
    pass


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., GenerativeConfig]:
    """Runs whose teacher has weights at random, and is heard from a cache of 200 runs."""

    def made(name: str, **changes: Any) -> GenerativeConfig:
        student = dict(STUDENTS[name])
        model = student["teacher"]["run"]["model"]
        file = tmp_path / f"{name}.safetensors"
        if not file.exists():
            net = validated(GenerativeConfig, student, where="toy").teacher
            assert net is not None
            save_weights(build_model(net.network).state_dict(), file)
        teacher = {"model": model, "weights": str(file), "source": "cached", "rows": 200}
        places = {"runs": str(tmp_path / "runs"), "caches": str(tmp_path / "caches")}
        return validated(
            GenerativeConfig, student | {"teacher": teacher} | places | changes, where="toy"
        )

    return made


def cache_of(run: GenerativeConfig) -> TraceCache:
    assert run.teacher is not None
    assert run.teacher.weights is not None
    return TraceCache(run, load_model(run.teacher.network, run.teacher.weights))


@pytest.mark.parametrize("name", ["ladder", "vrnn", "eruptions"])
@pytest.mark.parametrize("mode", ["surrogate", "local"])
def test_the_loss_of_a_kept_run_is_that_of_the_run(
    name: str, mode: str, run_of: Callable[..., GenerativeConfig]
) -> None:
    run = run_of(name, mode=mode)
    assert run.teacher is not None
    traces = cache_of(run).traces(watch)
    step, teacher = step_of(run, run.teacher.weights)
    assert teacher is not None
    rows = np.array([7, 150, 31])
    alive = run_of_rows(run.teacher.network, teacher, torch.from_numpy(rows))
    losses = [
        step.distiller(3, teacher_trace=trace).loss  # type: ignore[operator, union-attr]
        for trace in (traces.take(rows, CPU), alive)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_a_student_learns_from_the_cache_without_a_run_of_its_teacher(
    run_of: Callable[..., GenerativeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("ladder", batch_size=32, batches=5)
    traces = cache_of(run).traces(watch)
    batches = Batches(run, None, 0, CPU, traces)
    step, teacher = step_of(run, run.teacher and run.teacher.weights)
    assert teacher is not None

    def refuse(run: Trace) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(teacher.generator, "forward", refuse)
    for batch in batches.train(0):
        step(batch).loss.backward()
    with pytest.raises(AssertionError, match="the teacher ran"):
        step.judged(next(iter(batches.held_out())))


def test_every_epoch_has_the_kept_runs_in_an_order_of_its_own(
    run_of: Callable[..., GenerativeConfig],
) -> None:
    run = run_of("eruptions", batch_size=40, batches=10)
    batches = Batches(run, None, 0, CPU, cache_of(run).traces(watch))
    orders = [
        torch.cat([batch.noise.row for batch in batches.train(epoch)]).tolist() for epoch in (0, 1)
    ]
    assert orders[0] != orders[1]
    for order in orders:
        assert sorted(order) == sorted([*range(200)] * 2)


def test_a_run_from_a_cache_is_trained_and_tracked(
    run_of: Callable[..., GenerativeConfig], workdir: Path
) -> None:
    run = run_of("eruptions")
    tracker = Tracker()
    result = train(run, watch=watch, tracker=tracker)
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]
    (tracked,) = tracker.client.search_runs([tracker.experiment_id])
    assert tracked.data.tags["kd.cache"] == cache_of(run).fingerprint
    assert run.identity != run_of("eruptions", caches="x", batch_size=16).identity
    live = run.model_copy(update={"teacher": run.teacher.model_copy(update={"source": "live"})})  # type: ignore[union-attr]
    assert live.identity != run.identity
    with pytest.raises(ValueError, match="which was not made ready"):
        GenerativeInputs(run.teacher and run.teacher.weights).fit(run, report=no_report)


def no_report(metrics: Metrics, checkpoint: Path | None) -> None:
    pass


def test_a_cache_is_shared_by_students_of_any_seed_and_grows_no_twice(
    run_of: Callable[..., GenerativeConfig], workdir: Path
) -> None:
    told: list[tuple[Any, ...]] = []
    inputs = [
        prepared(run_of("eruptions", seed=seed), watch=lambda *a: told.append(a), tracker=Tracker())
        for seed in (0, 1)
    ]
    assert inputs[0].fingerprint == inputs[1].fingerprint
    assert [one[:3] for one in told] == [("cache", 0, 200), ("cache", 200, 200)]


def test_what_was_written_before_a_stop_is_not_written_again(
    run_of: Callable[..., GenerativeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "ROWS_PER_FILE", 64)
    cache = cache_of(run_of("vrnn"))

    def stop(done: int, total: int, note: str) -> None:
        if done >= 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.traces(stop)
    (unfinished,) = inspected(cache.store).unfinished
    assert unfinished == f"{TRACE}/{view_folder(0)}"
    folder = cache.store / TRACE / view_folder(0)
    first = folder.read("part-00000.parquet").to_pybytes()
    ran: list[int] = []
    real = written.run_of_rows

    def counted(*given: Any) -> Trace:
        ran.append(len(given[2]))
        return real(*given)

    monkeypatch.setattr(written, "run_of_rows", counted)
    assert len(cache.traces(watch)) == 200
    assert ran == [64, 8]
    assert folder.read("part-00000.parquet").to_pybytes() == first
    assert folder.has(DONE)
    table = read_parquet(folder.read("part-00003.parquet"), name="the last")
    assert table[SAMPLE].to_pylist() == [*range(192, 200)]
    assert {"eps/z[0]", "par/z[0]/loc", "val/pen[7]", "par/pen[7]/logits"} <= {*table.column_names}


def test_faults_are_found(run_of: Callable[..., GenerativeConfig], workdir: Path) -> None:
    run = run_of("eruptions")
    with pytest.raises(ValueError, match="run `kd cache` first"):
        cache_faults(run, watch=watch, tracker=Tracker())
    cache = cache_of(run)
    cache.traces(watch)
    assert cache_faults(run, watch=watch, tracker=Tracker()) == {"teacher": []}
    assert inspected(cache.store).columns[0].rows == 200
    assert prune(cache.store) == []
    # the same bytes of another teacher: only what it says tells
    other = TraceCache(run, build_model(run.model.model_copy(update={"width": 8})))
    (cache.store.parent / other.store.name).write(
        "manifest.json", cache.store.read("manifest.json")
    )
    folder = f"{TRACE}/{view_folder(0)}"
    for name in ("part-00000.parquet", DONE):
        other.store.write(f"{folder}/{name}", cache.store.read(f"{folder}/{name}"))
    assert any("the teacher differs in 'par/y1/loc'" in fault for fault in other.faults())
    cache.store.write(f"{folder}/part-00000.parquet", b"something else")
    (fault,) = cache_faults(run, watch=watch, tracker=Tracker())["teacher"]
    assert fault.endswith("part-00000.parquet is gone or has changed")


def test_the_command_writes_shows_and_verifies(
    run_of: Callable[..., GenerativeConfig], workdir: Path
) -> None:
    run = run_of("eruptions")
    file = workdir / "run.yaml"
    file.write_text(yaml.safe_dump(plain(run)))

    def said(*words: str) -> str:
        result = CliRunner().invoke(app, ["cache", str(file), *words])
        assert result.exit_code == 0, result.output
        return result.output

    name = cache_of(run).fingerprint
    assert f"cache {name}: 200 runs of the teacher" in said()
    assert TRACE in said("--info")
    assert "1 caches are as they were written" in said("--verify")
    assert "nothing: every view is finished" in said("--prune")
    live = CliRunner().invoke(app, ["cache", str(file), "--set", "teacher.source=live"])
    assert live.exit_code == 2
    assert "no teacher has `source: cached`: nothing to cache" in live.output


@pytest.mark.parametrize("changes", [{"mode": "marginalized"}, {"distil": {"noise": 2}}])
def test_runs_that_a_cache_cannot_serve_are_refused(
    changes: dict[str, Any], run_of: Callable[..., GenerativeConfig]
) -> None:
    with pytest.raises(ValueError, match=r"teacher\.source: a cache is of runs with one sample"):
        run_of("eruptions", **changes)
    with pytest.raises(ValueError, match="the address holds a password"):
        run_of("eruptions", caches="s3://key:secret@bucket/caches")
    assert not run_of("eruptions", mode="scratch", data={"table": "eruptions"}).hears_cache
    going_on = {**GOING_ON, "teacher": {**GOING_ON["teacher"], "source": "cached"}}
    with pytest.raises(ValueError, match=r"teacher\.source"):
        validated(GenerativeConfig, going_on, where="toy")
