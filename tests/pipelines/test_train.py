from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipelines.config import RunConfig
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.inputs import GenerativeInputs
from pipelines.generative.models import build_model
from pipelines.loading import load
from pipelines.loop import BEST, LAST, STATE, Metrics
from pipelines.models import build_network, save_weights
from pipelines.sources import read_pictures
from pipelines.space import changed
from pipelines.strict import validated
from pipelines.train import RESULT, Inputs, finished, train_here, train_on_workers
from tests.pipelines.generative_toys import STUDENTS
from tests.timeless import timeless

# LayerNorm, not BatchNorm: workers see their own half of a batch, so only such a network can agree
VIT: dict[str, Any] = {
    "teacher": None,
    "losses": {"ce": {}},
    "student": {"name": "timm/test_vit", "params": {"img_size": 8, "patch_size": 4}},
    "optimizer": {"lr": 0.01},
    "data.augment": {"crop": 1},
}


@pytest.fixture
def run(toy_run: Path, workdir: Path) -> RunConfig:
    loaded = load(toy_run)
    assert isinstance(loaded, RunConfig)
    return changed(loaded, VIT)


def inputs_of(run: RunConfig) -> Inputs:
    return Inputs(read_pictures(run.data, "train"))


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def no_word(metrics: Metrics) -> None:
    pass


def test_a_finished_run_is_found_by_its_folder(run: RunConfig) -> None:
    small = changed(run, {"student": {"name": "convnet"}, "epochs": 1})
    assert finished(small) is None
    result = train_here(small, inputs_of(small), no_word)
    assert finished(small) == result
    assert files_of(result.folder) == {BEST, LAST, STATE, RESULT}
    assert finished(changed(small, {"seed": 1})) is None


@pytest.mark.usefixtures("local_ray")
def test_two_ray_workers_train_what_one_process_trains(run: RunConfig) -> None:
    told: list[Metrics] = []
    net = build_network(run.student, num_classes=10, in_channels=1)
    save_weights(net.state_dict(), Path("start.safetensors"))  # Ray was started elsewhere
    run = changed(run, {"student.weights": "start.safetensors"})
    pair = changed(run, {"workers": 2, "save_every": 3})
    together = train_on_workers(pair, inputs_of(run), told.append)
    alone = train_here(run, inputs_of(run), no_word)
    assert together.folder != alone.folder
    assert told == together.history
    for here, there in zip(together.history, alone.history, strict=True):
        for name in ("train/loss", "train/top1", "val/nll", "val/top1"):
            assert here[name] == pytest.approx(there[name], rel=1e-4), name
    torch.testing.assert_close(
        load_file(together.folder / LAST), load_file(alone.folder / LAST), rtol=1e-3, atol=1e-4
    )
    assert files_of(together.folder) == {BEST, LAST, STATE, RESULT}


@pytest.mark.usefixtures("local_ray")
def test_two_ray_workers_distil_the_graphical_model_of_one_process(workdir: Path) -> None:
    plain = {"name": "sgd", "lr": 1e-5, "momentum": 0, "schedule": {"name": "steps"}}
    alone = validated(GenerativeConfig, {**STUDENTS["ladder"], "optimizer": plain}, where="toy")
    assert alone.teacher is not None
    inputs = GenerativeInputs(workdir / "teacher.safetensors")
    save_weights(build_model(alone.teacher.network).state_dict(), workdir / "teacher.safetensors")
    told: list[Metrics] = []
    together = train_on_workers(changed(alone, {"workers": 2}), inputs, told.append)
    one = train_here(alone, inputs, no_word)
    assert told == together.history
    assert len(one.history) == alone.epochs
    assert one.history[0]["train/loss"] != one.history[1]["train/loss"]
    assert {epoch["system/workers"] for epoch in together.history} == {2}
    for here, there in zip(together.history, one.history, strict=True):
        assert timeless(here) == pytest.approx(timeless(there), rel=1e-3, abs=1e-5)
    torch.testing.assert_close(
        load_file(together.weights), load_file(one.weights), rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_costs_nothing_but_time(run: RunConfig) -> None:
    longer = changed(run, {"workers": 2, "epochs": 4, "save_every": 3})
    killed: list[int] = []

    def kill_one(metrics: Metrics) -> None:
        if not killed:
            workers = [
                process
                for process in psutil.Process().children(recursive=True)
                if "RayTrainWorker" in " ".join(process.cmdline())
            ]
            killed.append(workers[0].pid)
            os.kill(workers[0].pid, signal.SIGKILL)

    told: list[Metrics] = []

    def follow(metrics: Metrics) -> None:
        told.append(metrics)
        kill_one(metrics)

    result = train_on_workers(longer, inputs_of(run), follow)
    undisturbed = train_here(changed(longer, {"workers": 1}), inputs_of(run), no_word)
    assert killed
    assert [metrics["epoch"] for metrics in result.history] == [1, 2, 3, 4]
    assert len(told) > 4, "the run was not disturbed: no epoch was told again"
    assert result.history[-1]["val/nll"] == pytest.approx(
        undisturbed.history[-1]["val/nll"], rel=1e-3
    )


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("elastic", [{}, {"batch_size": 64, "workers": 64, "min_workers": 64}])
def test_more_workers_than_the_cluster_has_are_refused_at_once(
    run: RunConfig, elastic: dict[str, Any]
) -> None:
    many = changed(run, {"workers": 32} | elastic)
    name, count = ("min_workers", 64) if elastic else ("workers", 32)
    with pytest.raises(ValueError, match=rf"^{name}: {count} are more than the \d+ that this"):
        train_on_workers(many, inputs_of(run), no_word)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_what_a_worker_cannot_do_is_said_in_one_line(run: RunConfig) -> None:
    wild = changed(
        run, {"workers": 2, "optimizer.lr": 1e30, "epochs": 1, "student": {"name": "convnet"}}
    )
    with pytest.raises(RuntimeError, match=r"^worker \d: the loss is .* lower optimizer.lr"):
        train_on_workers(wild, inputs_of(run), no_word)


def test_two_who_want_the_same_run_train_it_once(run: RunConfig) -> None:
    small = changed(run, {"student": {"name": "convnet"}, "epochs": 2})
    inputs = inputs_of(small)
    told: list[Metrics] = []
    with ThreadPoolExecutor(2) as pool:
        pair = [pool.submit(train_here, small, inputs, told.append) for _ in range(2)]
        first, second = (future.result() for future in pair)
    assert first == second
    assert [metrics["epoch"] for metrics in told] == [1, 2, 1, 2]
    assert told[:2] == told[2:], "the second heard other numbers: it trained again"
