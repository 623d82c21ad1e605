"""Runs without data: online methods in the ordinary loop, under its checks and its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcore.datafree.plans import EveryEpoch, Offline
from kdcore.datafree.presets import PRESETS
from kdcore.datafree.targets import Classes, GaussianPredictions
from pipelines.build import build_step, build_teacher, checked
from pipelines.config import RunConfig
from pipelines.data import Reader
from pipelines.jobs import follower
from pipelines.loading import load
from pipelines.loop import LAST, Metrics, Progress, fit, keep
from pipelines.methods import changed_method
from pipelines.models import build_network, save_weights, weights_digest
from pipelines.networks import ModelConfig
from pipelines.sources import Pictures, read_pictures
from pipelines.space import SweepConfig, changed, points
from pipelines.strict import validated
from pipelines.synthetic import sample_of
from pipelines.train import Inputs, Teacher, train_here, train_on_workers
from tests.timeless import timeless

CONFIGS = Path(__file__).parents[2] / "pipelines" / "configs"
CPU = torch.device("cpu")
ONLINE = [name for name, one in PRESETS.items() if not isinstance(one.schedule, Offline)]
SMALL = {"network": {"latent": 8, "width": 4}}
BATCH = 16
# LayerNorm, not BatchNorm, whose statistics each worker has of its own rows
WITHOUT_BATCH_NORM: dict[str, dict[str, Any]] = {
    "vit": {"name": "timm/test_vit", "params": {"img_size": 8, "patch_size": 4}},
    "convnext": {"name": "timm/test_convnext", "params": {"patch_size": 1}},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and on a busy machine wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def teacher_weights() -> dict[str, Tensor]:
    """Of a network that has seen the digits."""
    run = validated(
        RunConfig,
        {
            "student": {"name": "convnet", "params": {"width": 6}},
            "data": {"name": "digits", "limit": 400, "validation": 0.2},
            "epochs": 3,
            "batch_size": 32,
            "optimizer": {"lr": 0.1},
            "losses": {"ce": {}},
        },
        where="teacher",
    )
    pictures = read_pictures(run.data, "train")
    step = build_step(run, pictures)
    fit(run, step, Reader(run, pictures), report=lambda *told: None, device=CPU)
    return dict(step.student.net.state_dict())


def small(method: str) -> dict[str, Any]:
    """A method's changes to the size of a test; its priors are as they are, from round 1 on."""
    plan = PRESETS[method]
    late = {name: {"after": 1} for name, one in plan.priors.items() if one.after > 1}
    schedule: dict[str, Any] = {"warmup": min(plan.schedule.warmup, 1)}
    if isinstance(plan.schedule, EveryEpoch):
        schedule |= {"batch_size": BATCH, "steps": 2, "student_steps": 3}
    else:
        schedule |= {"rounds": 2, "student_steps": min(plan.schedule.student_steps, 2)}
    images = {} if method == "adaptive_deepinversion" else SMALL
    return {"schedule": schedule, "priors": late, "images": images}


def content_of(folder: Path, method: str = "fast", **synthetic: Any) -> dict[str, Any]:
    weights = folder / "teacher.safetensors"
    save_file(teacher_weights(), weights)
    teacher = {"name": "convnet", "params": {"width": 6}, "weights": str(weights)}
    return {
        "student": {"name": "convnet", "params": {"width": 4}},
        "teacher": {**teacher, "source": "live"},
        "data": {"name": "digits", "limit": 400, "validation": 0.2},
        "synthetic": {"method": method, "change": small(method), **synthetic},
        "epochs": 3,
        "batch_size": BATCH,
        "optimizer": {"lr": 0.02},
        "losses": {"kd": {"weight": 1}},
        "runs": str(folder / "runs"),
    }


def run_of(folder: Path, method: str = "fast", **synthetic: Any) -> RunConfig:
    return validated(RunConfig, content_of(folder, method, **synthetic), where="toy")


def inputs_of(run: RunConfig) -> Inputs:
    pictures = read_pictures(run.data, "train")
    teachers = {}
    for label, layers in run.teacher_layers.items():
        held = build_teacher(run.teachers[label], pictures, layers)
        teachers[label] = Teacher(Path("teacher.safetensors"), live=held)
    return Inputs(pictures, teachers)


def exactly(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def no_word(metrics: Metrics) -> None:
    pass


def numbers(history: list[Metrics]) -> list[Metrics]:
    return [timeless(told) for told in history]


# --- every method in the ordinary run ---------------------------------------------------------


@pytest.mark.parametrize("method", ONLINE)
def test_a_student_is_trained_without_data_and_the_teacher_stays_as_it_was(
    method: str, tmp_path: Path
) -> None:
    run = run_of(tmp_path, method)
    inputs = inputs_of(run)
    ((_, teacher),) = inputs.teachers.items()
    assert teacher.live is not None
    before = weights_digest(teacher.live.net)
    untrained = build_step(run, inputs.pictures).student.net.state_dict()
    result = train_here(run, inputs, no_word)
    assert [told["epoch"] for told in result.history] == [1, 2, 3]
    assert weights_digest(teacher.live.net) == before
    moved = load_file(result.folder / LAST)["classifier.weight"] - untrained["classifier.weight"]
    assert float(moved.abs().max()) > 1e-4
    last = result.history[-1]
    shares = [last[f"synthetic/share/{number}"] for number in range(10)]
    assert sum(shares) == pytest.approx(1)
    assert last["synthetic/statistics"] > 0
    priors = {name for name, one in PRESETS[method].priors.items() if one.weight}
    assert {name.removeprefix("synthetic/part/") for name in last if "/part/" in name} == priors


def test_dfq_trains_a_student_of_eight_bits(tmp_path: Path) -> None:
    student = {"name": "convnet", "params": {"width": 4}, "quantise": {"bits": 8}}
    run = validated(RunConfig, {**content_of(tmp_path, "dfq"), "student": student}, where="toy")
    result = train_here(run, inputs_of(run), no_word)
    greatest = load_file(result.folder / LAST)["classifier.rounding.greatest"]
    assert float(greatest) > 0
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]


def test_no_picture_of_the_data_is_trained_on(tmp_path: Path) -> None:
    run = run_of(tmp_path, "fast")
    inputs = inputs_of(run)
    blank = Pictures(
        inputs.pictures.image.copy(), inputs.pictures.label.copy(), inputs.pictures.num_classes
    )
    rows = Reader(run, blank).train_rows
    blank.image[rows], blank.label[rows] = 0, 0
    alone, with_data = (
        fitted(run, replace(inputs, pictures=pictures)) for pictures in (blank, inputs.pictures)
    )
    assert numbers(alone.history) == numbers(with_data.history)


def fitted(run: RunConfig, inputs: Inputs, **how: Any) -> Progress:
    step = build_step(run, inputs.pictures)
    how = {"report": lambda *told: None, "live": inputs.live(CPU), "device": CPU, **how}
    return fit(run, step, Reader(run, inputs.pictures), **how)


@pytest.mark.parametrize("method", ONLINE)
def test_a_run_without_data_that_breaks_off_goes_on_as_if_it_had_not(
    method: str, tmp_path: Path
) -> None:
    run = run_of(tmp_path, method, select="agreement")
    inputs, kept = inputs_of(run), tmp_path / "kept"

    def break_off(metrics: Metrics | None, folder: Path | None) -> None:
        assert folder is not None
        keep(folder, kept)
        if metrics is not None and metrics["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(run, inputs, report=break_off)
    resumed = fitted(run, inputs, resume=kept)
    undisturbed = fitted(run, inputs)
    assert numbers(resumed.history) == numbers(undisturbed.history)


@pytest.mark.parametrize(
    ("method", "warmup", "more"),
    [("dfq", 6, {}), ("dafl", 7, {"schedule.replay": True, "pool_limit": 64}), ("cmi", 3, {})],
)
def test_a_warm_up_that_breaks_off_goes_on_where_it_was(
    method: str, warmup: int, more: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"schedule.warmup": warmup, **more}
    run = changed(
        run_of(tmp_path, method, select="agreement"),
        {f"synthetic.change.{path}": value for path, value in changes.items()},
    )
    inputs, kept = inputs_of(run), tmp_path / "kept"
    stops: list[Path] = []

    def count(metrics: Metrics | None, folder: Path | None) -> None:
        if metrics is None:
            assert folder is not None
            stops.append(folder)

    def break_off(metrics: Metrics | None, folder: Path | None) -> None:
        assert metrics is None
        assert folder is not None
        keep(folder, kept)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(run, inputs, report=break_off)
    resumed = fitted(run, inputs, report=count, resume=kept)
    assert len(stops) == 2  # a third of it is not made again
    undisturbed = fitted(run, inputs, report=count)
    assert len(stops) == 5
    assert numbers(resumed.history) == numbers(undisturbed.history)


def test_the_best_epoch_may_be_told_without_labels(tmp_path: Path) -> None:
    run = run_of(tmp_path, "fast", select="agreement")
    inputs = inputs_of(run)
    progress = fitted(run, inputs)
    agreements = [told["synthetic/agreement"] for told in progress.history]
    assert progress.best is not None
    assert progress.best["synthetic/agreement"] == max(agreements)
    assert all(0 <= one <= 1 for one in agreements)
    by_accuracy = run_of(tmp_path, "fast")
    assert run.identity != by_accuracy.identity
    assert set(run.metrics) - set(by_accuracy.metrics) == {"synthetic/agreement"}


def test_pictures_are_drawn_now_and_then_and_logged_as_an_artifact(tmp_path: Path) -> None:
    run = run_of(tmp_path, "dfq", samples_every=2)
    logged: list[Path] = []

    class Tracked:
        last_epoch = 0

        def log(self, metrics: Metrics, *, epoch: int) -> None:
            pass

        def log_artifact(self, path: Path) -> None:
            logged.append(path)

    train_here(run, inputs_of(run), follower(run, Tracked(), lambda *told: None))  # type: ignore[arg-type]
    assert logged == [sample_of(run, 2)]
    with Image.open(sample_of(run, 2)) as drawn:
        assert drawn.size == (32, 32), "sixteen pictures of 8 x 8"
    every = run_of(tmp_path, "dfq", samples_every=1)
    assert every.identity == run.identity


@pytest.mark.usefixtures("local_ray")
def test_two_ray_workers_invent_and_train_as_one_process(tmp_path: Path) -> None:
    content = {**content_of(tmp_path, "dfq"), "student": WITHOUT_BATCH_NORM["vit"], "epochs": 2}
    run = validated(RunConfig, content, where="toy")
    run = changed(run, {"synthetic.change.schedule.warmup": 3})  # with one stop
    pair = changed(run, {"workers": 2})
    together = train_on_workers(pair, inputs_of(pair), no_word)
    alone = train_here(run, inputs_of(run), no_word)
    for here, there in zip(together.history, alone.history, strict=True):
        assert here.keys() == there.keys()
        for name in timeless(here):
            assert here[name] == pytest.approx(there[name], rel=1e-3, abs=1e-5), name


# --- what is refused, and what makes another run ----------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"synthetic": {"method": "fat"}}, "synthetic.method: unknown method 'fat'"),
        (
            {"synthetic": {"method": "zskd"}},
            "synthetic.method: 'zskd' makes its pictures before any student: write them with "
            "`kd synthesize`.*adaptive_deepinversion, dafl, zskt, dfq, cmi, fast",
        ),
        (
            {"synthetic": {"method": "fast", "change": {"images": {"lrr": 1}}}},
            r"synthetic: unknown key change.images 'lrr'; did you mean 'lr'",
        ),
        (
            {"synthetic": {"method": "dafl", "change": {"targets": {"devation": 2}}}},
            "synthetic: unknown key change.targets 'devation'; did you mean 'deviation'",
        ),
        (
            {"synthetic": {"method": "dafl", "change": {"targets": {"deviation": 2, "floor": 1}}}},
            "change.targets: no kind of it has all of deviation, floor",
        ),
        (
            {"synthetic": {"method": "dafl", "change": {"schedule": {"rounds": 0}}}},
            "change.schedule.rounds: input should be greater than 0, got 0",
        ),
        (
            {"synthetic": {"method": "zskt", "change": {"images": {"clip_norm": 0}}}},
            "change.images.clip_norm: input should be greater than 0, got 0",
        ),
        (
            {"synthetic": {"method": "fast", "change": {"images": {"count": 2}}}},
            "change.images has the keys of Generators, and this method has Adapted",
        ),
        (
            {"synthetic": {"method": "fast", "change": {"images": None}}},
            "change.images: expected a mapping of keys, got None",
        ),
        (
            {"synthetic": {"method": "fast", "change": {"losses": {"kd": {}}}}},
            "are the losses of the run; give it there",
        ),
        (
            {"synthetic": {"method": "dafl", "change": {"schedule": {"batch_size": 32}}}},
            "batch_size is 16 and synthetic.change.schedule.batch_size is 32; they are the same",
        ),
        (
            {"synthetic": {"method": "cmi", "change": {"schedule": {"warmup": 1}}}},
            "synthetic.change.priors.masked_disagreement.after is 195 rounds, and the run has 4: "
            "1 of schedule.warmup and 1 in each of 3 epochs",
        ),
        ({"data": {"name": "digits", "views": 2}}, "data.views: 2 are views of real pictures"),
        ({"save_every": 2}, "save_every: what makes synthetic pictures is written down between"),
        ({"workers": 2, "min_workers": 1}, "min_workers: each worker remembers the synthetic"),
        ({"teacher": None, "losses": {"ce": {}}}, "synthetic needs a teacher and the run has none"),
        ({"workers": 3, "batch_size": 18}, "batch_size 16 must be a multiple of workers 3"),
    ],
)
def test_what_contradicts_synthetic_pictures_is_said_before_anything_starts(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        validated(RunConfig, {**content_of(tmp_path), **changes}, where="toy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "cached"}, "the teacher is cached, and a cache says nothing of synthetic"),
        ({"precision": "bf16"}, "the teacher has precision bf16: .* which need fp32"),
    ],
)
def test_the_teacher_must_be_live_and_precise(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = content_of(tmp_path)
    content["teacher"] |= changes
    with pytest.raises(ValueError, match=message):
        validated(RunConfig, content, where="toy")


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_a_teacher_without_batch_norm_is_told_which_methods_work(name: str, tmp_path: Path) -> None:
    content, model = content_of(tmp_path, "cmi"), WITHOUT_BATCH_NORM[name]
    weights = tmp_path / f"{name}.safetensors"
    net = build_network(ModelConfig(**model), num_classes=10, in_channels=1)
    save_weights(net.state_dict(), weights)
    content["teacher"] = {**model, "weights": str(weights), "source": "live"}
    run = validated(RunConfig, content, where="toy")
    with pytest.raises(
        ValueError, match=r"synthetic.cmi: .* has no such layer; .* without: dafl, zskt$"
    ):
        checked(run)


def test_a_loss_that_remembers_rows_is_refused(tmp_path: Path) -> None:
    content = {**content_of(tmp_path), "losses": {"crd": {}}}
    with pytest.raises(ValueError, match=r"losses.crd: .*use infonce, which needs no memory"):
        checked(validated(RunConfig, content, where="toy"))


def test_the_student_s_batch_is_the_run_s_or_else_the_method_s(tmp_path: Path) -> None:
    content = content_of(tmp_path, "zskt")
    del content["batch_size"]
    run = validated(RunConfig, content, where="toy")
    assert run.batch_size == PRESETS["zskt"].schedule.batch_size
    assert run.synthetic is not None
    assert run.synthetic.plan_of(48).schedule.batch_size == 48


def test_only_a_run_with_synthetic_pictures_is_identified_by_them(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    other = changed(run, {"synthetic.change.images.lr": 0.5})
    published = PRESETS["fast"].priors["class"].weight
    same = changed(run, {"synthetic.change.priors.class.weight": published})
    assert run.identity != other.identity
    assert run.identity == same.identity
    assert run.identity != changed(run, {"synthetic": None}).identity


def test_the_runs_and_sweeps_without_data_that_ship_are_checked() -> None:
    run = load(CONFIGS / "runs" / "digits_synthetic.yaml")
    assert isinstance(run, RunConfig)
    checked(run)
    sweep = load(CONFIGS / "sweeps" / "digits_synthetic.yaml")
    assert isinstance(sweep, SweepConfig)
    for point in points(sweep):
        checked(sweep.run(point))


def test_targets_that_a_method_has_not_are_of_the_kind_that_has_their_keys() -> None:
    drawn = changed_method("dafl", {"targets": {"deviation": 2}})
    assert drawn.targets == GaussianPredictions(deviation=2.0)
    assert changed_method("dafl", {"targets": {}}).targets == Classes()
    assert changed_method("dafl", {"targets": None}).targets is None
    drawn = changed_method("deepinversion", {"targets": {"deviation": 2}})
    assert drawn.targets == GaussianPredictions(deviation=2.0)
    assert changed_method("deepinversion", {"targets": None}).targets is None


def test_a_prior_s_parameter_is_kept_as_the_type_of_the_signature() -> None:
    plan = changed_method("cmi", {"priors": {"contrast": {"params": {"temperature": 1}}}})
    assert repr(plan.priors["contrast"].params) == "{'temperature': 1.0}"


@pytest.mark.parametrize("name", PRESETS)
def test_every_published_value_is_one_that_may_be_given(name: str) -> None:
    published = asdict(PRESETS[name])
    del published["losses"]
    assert changed_method(name, published) == PRESETS[name]
