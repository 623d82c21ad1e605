"""Runs of graphical models as files: told apart, checked, identified, and built as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kdcore.dgm.objective import PUBLISHED
from pipelines.config import RunConfig
from pipelines.generative.batches import Batches
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.inputs import step_of
from pipelines.generative.jobs import checked
from pipelines.generative.models import build_model
from pipelines.loading import load
from pipelines.space import SweepConfig, changed, neighbours
from pipelines.strict import validated

CONFIGS = Path(__file__).parents[2] / "pipelines" / "configs"
TEACHER: dict[str, Any] = {
    "model": {"name": "ladder_vae", "width": 4, "image": [1, 8, 8]},
    "data": {"name": "digits"},
    "epochs": 2,
}
STUDENT = {"model": {**TEACHER["model"], "width": 2}, "teacher": {"run": TEACHER}, "epochs": 1}


def run_of(**content: Any) -> GenerativeConfig:
    return validated(GenerativeConfig, content, where="toy")


def configs() -> list[Path]:
    return sorted(CONFIGS.glob("generative/*.yaml"))


@pytest.mark.parametrize("path", configs(), ids=lambda path: path.stem)
def test_every_shipped_run_loads_and_its_networks_are_built(path: Path) -> None:
    run = load(path)
    assert isinstance(run, GenerativeConfig)
    assert run.mode == ("scratch" if path.stem.endswith("_teacher") else run.mode)
    with torch.device("meta"):
        build_model(run.model)


# Chen et al. 2023, table 1 and section 2.4 of our notes: millions, with the encoder
SIZES = {
    "celeba_teacher": 6.60,
    "celeba": 0.04,
    "svhn_teacher": 5.39,
    "svhn": 0.03,
    "cifar10_teacher": 5.39,
    "cifar10": 0.03,
    "eyeglasses": 1.36,
}


@pytest.mark.parametrize("name", SIZES)
def test_published_runs_have_the_published_number_of_parameters(name: str) -> None:
    run = load(CONFIGS / "generative" / f"{name}.yaml")
    assert isinstance(run, GenerativeConfig)
    with torch.device("meta"):
        model = build_model(run.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == SIZES[name]


@pytest.mark.parametrize("name", ["celeba", "svhn", "cifar10"])
def test_published_runs_start_from_a_folder_of_pictures(name: str, tmp_path: Path) -> None:
    size = 64 if name == "celeba" else 32
    for place in range(10):
        file = tmp_path / "train" / "all" / f"{place}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (178, 218), (20 * place, 90, 200)).save(file)
    given = ["data.name=folder", f"data.root={tmp_path}", "batch_size=4"]
    teacher = load(CONFIGS / "generative" / f"{name}_teacher.yaml", given)
    own = [f"teacher.run.{change}" for change in given] + ["batch_size=4"]
    student = load(CONFIGS / "generative" / f"{name}.yaml", own)
    for run in (teacher, student):
        assert isinstance(run, GenerativeConfig)
        seen = checked(run)
        step, _ = step_of(run, None, blank=True)
        batch = next(Batches(run, seen, 0, torch.device("cpu")).train(0))
        if run is teacher:
            assert batch.targets["y"].shape == (4, 3, size, size)
        loss = step.train()(batch).loss
        loss.backward()
        assert bool(loss.isfinite())


def test_a_file_with_a_model_is_a_run_of_one_and_another_of_a_student(toy_run: Path) -> None:
    assert isinstance(load(toy_run), RunConfig)
    assert isinstance(load(CONFIGS / "generative" / "digits.yaml"), GenerativeConfig)


def test_a_sweep_over_graphical_models_has_only_runs_that_exist() -> None:
    config = load(CONFIGS / "generative" / "sweeps" / "digits.yaml")
    assert isinstance(config, SweepConfig)
    runs = neighbours(config)
    assert {run.mode for run in runs} == {"surrogate", "local", "scratch"}
    assert [run.is_control for run in runs].count(True) == 1
    with pytest.raises(ValueError, match=r"search\.metric: unknown metric 'val/top1'"):
        validated(SweepConfig, {"base": STUDENT}, where="sweep")
    space = {"distil.target": {"grid": ["kl", "kll"]}}
    content = {"base": STUDENT, "space": space, "search": {"metric": "val/mmd"}}
    with pytest.raises(ValueError, match=r"distil\.target: value 'kll' is no run"):
        validated(SweepConfig, content, where="sweep")


MISTAKES = {
    "mode surrogate needs a teacher": {**TEACHER, "mode": "surrogate"},
    "mode scratch learns from data": {**TEACHER, "data": None},
    "unknown key 'laten'": {**STUDENT, "distil": {"laten": "kl"}},
    "like: expected one of": {**STUDENT, "distil": {"like": "vae"}},
    "batch_size 63 must be a multiple of workers 2": {**STUDENT, "batch_size": 63, "workers": 2},
    "must divide the picture's 8": {**TEACHER, "model": {**TEACHER["model"], "sizes": [3, 1]}},
    "image: expected a square": {**TEACHER, "model": {**TEACHER["model"], "image": [1, 8, 4]}},
    "scratch.condition is 0, and the model has 0": {**TEACHER, "scratch": {"condition": 0}},
    "the model must be the teacher's": {**STUDENT, "mode": "continual"},
    "a teacher is either": {**STUDENT, "teacher": {}},
    "data.views": {
        **TEACHER,
        "data": {"name": "digits", "views": 2},
    },
    "features: network goes with": {**STUDENT, "distances": {"features": "network"}},
    "distances.features: teacher needs one": {**TEACHER, "distances": {"features": "teacher"}},
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_said_before_anything_is_trained(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run_of(**MISTAKES[words])


def test_a_publication_s_objective_is_taken_and_changed() -> None:
    run = run_of(**STUDENT, distil={"like": "vrnn", "over_dims": "mean"})
    assert run.distil.weight == PUBLISHED["vrnn"].latent_weight == 1e-3
    assert run.distil.over_steps == "mean"
    assert run.distil.objective.over_dims == "mean"


def test_the_optimiser_is_adam_unless_another_is_named() -> None:
    assert run_of(**TEACHER, optimizer={"lr": 0.1}).optimizer.name == "adam"
    assert run_of(**TEACHER, optimizer={"name": "sgd"}).optimizer.momentum == 0.9


def test_what_decides_no_number_is_not_part_of_the_identity() -> None:
    run = run_of(**STUDENT)
    assert run.mode == "surrogate"
    same = {"name": "other", "runs": "elsewhere", "scratch.warmup": 0.1, "continual.share": 0.1}
    for path, value in same.items():
        assert changed(run, {path: value}).identity == run.identity, path
    other = {
        "distil.weight": 0.5,
        "mode": "local",
        "batches": 7,
        "seed": 1,
        "workers": 2,
        "min_workers": 1,
        "distances.rows": 9,
        "teacher.run.epochs": 3,
    }
    for path, value in other.items():
        assert changed(run, {path: value}).identity != run.identity, path


def test_a_student_from_scratch_learns_from_its_teacher_s_data() -> None:
    scratch = changed(run_of(**STUDENT), {"mode": "scratch"})
    assert isinstance(scratch, GenerativeConfig)
    assert scratch.evidence == run_of(**TEACHER).data
    with_own = changed(scratch, {"data": TEACHER["data"]})
    assert changed(scratch, {"distil.weight": 3}).identity == scratch.identity
    assert with_own.selects == ("val/elbo", "max")
