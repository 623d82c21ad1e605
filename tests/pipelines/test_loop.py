"""Training: what it learns, reports and keeps, and that an interruption leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdcore.losses import LOSSES, Logits, Stateful
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.teachers import taught
from pipelines import loop
from pipelines.build import build_step, build_teacher
from pipelines.config import RunConfig
from pipelines.data import Reader, TeacherRows, view_of
from pipelines.diagnostics import bounds, matched
from pipelines.loop import BEST, LAST, STATE, Metrics, Progress, Sums, evaluate, fit, keep
from pipelines.models import load_weights
from pipelines.sources import Pictures, read_pictures
from pipelines.strict import validated
from pipelines.views import normalised
from tests.timeless import timeless

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and on a busy machine wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


BASE: dict[str, Any] = {
    "student": {"name": "convnet", "params": {"width": 4}},
    "data": {"name": "digits", "limit": 250, "validation": 0.2, "views": 2},
    "epochs": 3,
    "batch_size": 10,
    "optimizer": {"lr": 0.1},
    "losses": {"ce": {}},
}
BASE["data"]["augment"] = {"crop": 1}
TEACHER = {"run": {**BASE, "student": {"name": "convnet", "params": {"width": 6}}}}
TAUGHT: dict[str, Any] = {
    "teacher": TEACHER,
    "losses": {"ce": {}, "kd": {}, "mid": {"loss": "mse", "layers": {"block2": "block2"}}},
}


PARAMETERS = tuple(
    f"student.net.{name}" for name in ("block1.0.weight", "block2.0.weight", "classifier.weight")
)


def run_of(**changes: Any) -> RunConfig:
    return validated(RunConfig, {**BASE, **changes}, where="toy")


def pictures_of(run: RunConfig) -> Pictures:
    return read_pictures(run.data, "train")


def teacher_of(run: RunConfig) -> Tapped:
    ((label, layers),) = run.teacher_layers.items()
    teacher = build_teacher(run.teachers[label], pictures_of(run), layers)
    teacher.net.load_state_dict(teacher_weights())
    return teacher


@dataclass
class Training:
    """One run's step and reader, and what its fit reported."""

    run: RunConfig
    rows: TeacherRows | None = None
    told: list[Metrics] = field(default_factory=list)
    lasts: list[dict[str, Tensor]] = field(default_factory=list)
    stop_after: int = 0  # checkpoints, one an epoch unless ``save_every``; 0 does not stop
    kept: Path | None = None

    def __post_init__(self) -> None:
        pictures = pictures_of(self.run)
        self.step: DistillStep = build_step(self.run, pictures)
        rows = {} if self.rows is None else dict.fromkeys(self.run.teachers, self.rows)
        self.reader = Reader(self.run, pictures, rows)

    def report(self, metrics: Metrics | None, folder: Path | None) -> None:
        if metrics is not None:
            self.told.append(metrics)
        if folder is None:
            return
        self.lasts.append(load_file(folder / LAST))
        if self.kept is not None:
            keep(folder, self.kept)
        if len(self.lasts) == self.stop_after:
            raise KeyboardInterrupt

    def fit(self, **how: Any) -> Progress:
        if "teacher" in how:  # the only one
            how["live"] = dict.fromkeys(self.run.teachers, how.pop("teacher"))
        how = {"report": self.report, "device": CPU, **how}
        return fit(self.run, self.step, self.reader, **how)

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: held.clone() for name, held in self.step.state_dict().items()}


def exactly(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def rows_of(run: RunConfig, teacher: Tapped) -> TeacherRows:
    """A teacher cache by hand: float16, every row in every view."""
    pictures = pictures_of(run)
    every = np.arange(len(pictures.label))
    with torch.no_grad():
        said = []
        for number in range(run.data.views + 1):
            image = view_of(run, pictures, every, number)
            said.append(teacher(normalised(image, mean=run.data.mean, std=run.data.std)))
    features = {
        layer: np.stack([outputs.features[layer].half().numpy() for outputs in said])
        for layer in said[0].features
    }
    logits = np.stack([outputs.logits.half().numpy() for outputs in said])
    return TeacherRows(logits, features, said[0].classifier)


@cache
def teacher_weights() -> dict[str, Tensor]:
    """Of a network that knows something: an untrained one tells all pictures nearly the same."""
    training = Training(run_of(**TEACHER["run"]))
    training.fit()
    return dict(training.step.student.net.state_dict())


# --- learning and reporting -------------------------------------------------------------------


def test_a_student_learns_and_every_epoch_is_reported() -> None:
    training = Training(run_of(epochs=6, **TAUGHT))
    progress = training.fit(teacher=teacher_of(training.run))
    assert progress.history == training.told
    assert [metrics["epoch"] for metrics in progress.history] == [1, 2, 3, 4, 5, 6]
    assert progress.best == max(progress.history, key=lambda metrics: metrics["val/top1"])
    assert progress.history[-1]["val/top1"] > 0.6  # chance is 0.1
    assert progress.history[-1]["train/loss"] < progress.history[0]["train/loss"]
    for metrics in progress.history:
        assert set(metrics) == {
            *("train/loss", "train/top1", "train/ce", "train/kd", "train/mid"),
            *("val/top1", "val/nll", "val/calibration_error"),
            *("epoch", "lr", "seconds"),
            *("system/cpu_cores", "system/memory_mib", "system/workers"),
        }
        parts = metrics["train/ce"] + 0.9 * metrics["train/kd"] + metrics["train/mid"]
        assert metrics["train/loss"] == pytest.approx(parts, rel=1e-5)


def test_fewer_workers_go_on_with_the_mean_of_what_there_were() -> None:
    shares = [torch.tensor([8.0, 2.0]), torch.tensor([4.0, 6.0])]
    sums = Sums()
    sums.load_state_dict({"steps": 2, "names": ["loss", "top1"], "sums": shares})
    sums.add({"loss": torch.tensor(3.0), "top1": torch.tensor(1.0)})
    # three steps, whose means over the workers were 6 in all and are 3 of this one
    assert sums.means() == pytest.approx({"train/loss": (6 + 3) / 3, "train/top1": (4 + 1) / 3})


def test_the_learning_rate_is_the_epoch_s() -> None:
    cosine = Training(run_of(epochs=2, optimizer={"schedule": {"name": "cosine", "floor": 0.5}}))
    rates = [metrics["lr"] for metrics in cosine.fit().history]
    # 0.05 (floor + (1 - floor) (1 + cos(pi t / T)) / 2) at t = 0 and 1 of T = 2
    assert rates == pytest.approx([0.05, 0.0375])
    schedule = {"name": "steps", "epochs": [1, 2], "gamma": 0.1}
    steps = Training(run_of(optimizer={"lr": 0.1, "schedule": schedule}))
    assert [metrics["lr"] for metrics in steps.fit().history] == pytest.approx([0.1, 0.01, 0.001])


def test_a_layer_may_have_a_multiple_of_the_learning_rate() -> None:
    one_step = {"epochs": 1, "batch_size": 200}  # all pictures of the training split

    def moved(**more: Any) -> dict[str, Tensor]:
        rate = {"lr": 0.1, "weight_decay": 0, "momentum": 0, **more}
        training = Training(run_of(**one_step, optimizer=rate))
        before = training.weights
        training.fit()
        return {name: training.weights[name] - before[name] for name in PARAMETERS}

    plain, slower = moved(), moved(multipliers={"block2": 0.25, "classifier": 3.0})
    for name in PARAMETERS:
        factor = {"block2": 0.25, "classifier": 3.0}.get(name.split(".")[2], 1.0)
        torch.testing.assert_close(slower[name], factor * plain[name], rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    one, same, other = (Training(run_of(epochs=1, seed=seed)) for seed in (0, 0, 1))
    for number, training in enumerate((one, same, other)):
        torch.manual_seed(1000 + number)
        training.fit()
    exactly(same.weights, one.weights)
    name = "student.net.block1.0.weight"
    assert bool((one.weights[name] != other.weights[name]).any())


def test_the_metrics_of_an_epoch_are_means_over_its_batches() -> None:
    # a rate this small moves no weight, so that the epoch can be recomputed afterwards
    training = Training(run_of(epochs=1, optimizer={"lr": 1e-30, "weight_decay": 0}))
    (metrics,) = training.fit().history
    training.step.train()
    with torch.no_grad():
        results = [(batch, training.step(batch)) for batch in training.reader.train(0)]
    losses = [float(result.loss) for _, result in results]
    right = [
        float((result.logits.argmax(1) == one.label).float().mean()) for one, result in results
    ]
    assert metrics["train/loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert metrics["train/top1"] == pytest.approx(np.mean(right), rel=1e-6)


# --- evaluation -------------------------------------------------------------------------------


def test_evaluation_equals_a_count_by_hand() -> None:
    training = Training(run_of(epochs=2))
    training.fit()
    training.step.eval()
    student, reader = training.step.student, training.reader
    metrics = evaluate(student, reader.validation(), device=CPU, prefix="test")
    rows = reader.validation_rows
    image = normalised(torch.from_numpy(reader.pictures.image[rows]), mean=(0.5,), std=(0.25,))
    label = torch.from_numpy(reader.pictures.label[rows])
    with torch.no_grad():
        chance = student(image).logits.double().softmax(dim=1)
    top, choice = chance.max(dim=1)
    right = (choice == label).double()
    # expected calibration error: 15 equal bins of confidence, |accuracy - confidence| by size
    bins = (top * 15).ceil().long()
    gaps = [(right - top)[bins == number].sum().abs() for number in range(1, 16)]
    nll = -chance[torch.arange(len(label)), label].log().mean()
    assert set(metrics) == {"test/top1", "test/nll", "test/calibration_error"}
    assert metrics["test/top1"] == pytest.approx(float(right.mean()), rel=1e-6)
    assert metrics["test/nll"] == pytest.approx(float(nll), rel=1e-5)
    error = float(torch.stack(gaps).sum() / len(label))
    assert metrics["test/calibration_error"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_student_as_it_came(training: bool) -> None:
    made = Training(run_of())
    student = made.step.student.train(training)
    before = made.weights
    evaluate(student, made.reader.validation(), device=CPU)
    assert student.training is training
    assert student.net.training is training
    exactly(made.weights, before)


def test_bounds_are_measured_on_held_out_pictures_from_a_cache_as_live() -> None:
    run = run_of(
        student=TEACHER["run"]["student"],
        teacher=TEACHER,
        losses={"ce": {}, "match": {"loss": "mse"}},
        diagnostics={"bounds": True, "rows": 20},
        optimizer={"lr": 0.002},
        epochs=1,
    )
    teacher = teacher_of(run)
    training = Training(run, rows_of(run, teacher))
    (metrics,) = training.fit().history
    (live,) = Training(run).fit(teacher=teacher).history
    pair = matched(training.step.student, taught(training.reader.held_out(20), teacher))
    assert len(pair.label) == 20
    expected = bounds(pair)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-2, abs=1e-3), name  # half precision
        assert live[name] == pytest.approx(metrics[name], rel=2e-2, abs=1e-3), name
    reach = metrics["bounds/student_head.lipschitz"] * metrics["bounds/class_wasserstein_1"]
    assert metrics["bounds/student_head.gap"] <= reach
    assert metrics["bounds/student_risk_bound"] >= metrics["bounds/student_head.student_risk"]


def test_a_control_with_bounds_keeps_its_teacher() -> None:
    off = run_of(teacher=TEACHER, losses={"ce": {}, "kd": {"weight": 0}})
    watched = run_of(
        teacher=TEACHER, losses={"ce": {}, "kd": {"weight": 0}}, diagnostics={"bounds": True}
    )
    assert not watched.is_taught
    alone = run_of(losses={"ce": {}})
    assert off.identity == alone.identity != watched.identity


def test_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows to evaluate"):
        evaluate(Training(run_of()).step.student, [], device=CPU)


# --- checkpoints ------------------------------------------------------------------------------


def test_best_is_the_best_epoch_s_student_and_last_the_last_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = iter([0.2, 0.9, 0.9, 0.5])  # of two equals the first is the best

    def scripted(*_: Any, **__: Any) -> Metrics:
        return {"val/top1": next(script)}

    monkeypatch.setattr(loop, "evaluate", scripted)
    training = Training(run_of(epochs=4), kept=tmp_path)
    progress = training.fit()
    assert progress.best is not None
    assert progress.best["epoch"] == 2
    exactly(load_file(tmp_path / BEST), training.lasts[1])
    exactly(load_file(tmp_path / LAST), training.lasts[3])
    exactly(load_file(tmp_path / LAST), dict(training.step.student.net.state_dict()))
    name = "block1.0.weight"
    assert bool((training.lasts[1][name] != training.lasts[3][name]).any())


def test_the_best_file_has_the_best_accuracy(tmp_path: Path) -> None:
    training = Training(run_of(epochs=4), kept=tmp_path)
    progress = training.fit()
    load_weights(training.step.student.net, tmp_path / BEST)
    metrics = evaluate(training.step.student, training.reader.validation(), device=CPU)
    assert progress.best is not None
    for name, value in metrics.items():
        assert value == pytest.approx(progress.best[name], rel=1e-6)


def test_a_checkpoint_is_three_files_that_the_receiver_may_move(tmp_path: Path) -> None:
    training = Training(run_of(epochs=2), kept=tmp_path / "runs" / "toy")
    training.fit()
    names = sorted(path.name for path in (tmp_path / "runs" / "toy").iterdir())
    assert names == sorted([STATE, BEST, LAST])


def test_keep_replaces_files_at_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    new, target = tmp_path / "new", tmp_path / "runs" / "toy"
    target.mkdir(parents=True)
    for name in (BEST, STATE, "notes.txt"):
        (target / name).write_text("old")
    new.mkdir()
    for name in (BEST, LAST, STATE):
        (new / name).write_text(f"new {name}")
    with (target / BEST).open() as reader:
        keep(new, target)
        assert reader.read() == "old"  # a file once opened stays whole
    assert list(new.iterdir()) == []
    held = {path.name: path.read_text() for path in target.iterdir()}
    assert held == {**{name: f"new {name}" for name in (BEST, LAST, STATE)}, "notes.txt": "old"}


# --- resuming ---------------------------------------------------------------------------------

DROPPING = {"name": "timm/test_resnet", "params": {"drop_rate": 0.5}}
STEPS = {"name": "adamw", "lr": 0.01, "schedule": {"name": "steps", "epochs": [1, 2]}}


@pytest.mark.parametrize(
    ("checkpoints_before", "changes"),
    [
        (1, {}),
        (2, {}),
        (1, TAUGHT),  # whose projector and its momentum must be remembered, too
        (2, {**TAUGHT, "optimizer": STEPS}),
        (1, {"optimizer": {"lr": 0.01, "nesterov": True}, "precision": "bf16"}),
        (1, {"student": DROPPING, "data": {**BASE["data"], "limit": 60}}),  # dropout draws numbers
        (1, {"save_every": 2}),  # before there is a best epoch
        (4, {**TAUGHT, "save_every": 2}),
        (1, {"student": DROPPING, "data": {**BASE["data"], "limit": 60}, "save_every": 1}),
    ],
)
def test_a_run_that_breaks_off_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, checkpoints_before: int, changes: dict[str, Any]
) -> None:
    run = run_of(**changes)
    live = {} if run.teacher is None else {"teacher": teacher_of(run)}
    undisturbed = Training(run, kept=tmp_path / "undisturbed")
    expected = undisturbed.fit(**live)

    broken = Training(run, kept=tmp_path / "broken", stop_after=checkpoints_before)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(**live)
    torch.manual_seed(12345)  # as in another process
    resumed = Training(run, kept=tmp_path / "broken")
    progress = resumed.fit(resume=tmp_path / "broken", **live)

    exactly(resumed.weights, undisturbed.weights)
    for name in (BEST, LAST):
        files = [load_file(tmp_path / folder / name) for folder in ("broken", "undisturbed")]
        exactly(*files)

    wanted = [timeless(metrics) for metrics in expected.history]
    assert [timeless(metrics) for metrics in progress.history] == wanted
    assert [timeless(metrics) for metrics in resumed.told] == wanted
    assert progress.best is not None
    assert expected.best is not None
    assert timeless(progress.best) == timeless(expected.best)
    exactly(resumed.lasts, undisturbed.lasts[checkpoints_before:])


def test_a_finished_run_is_told_again_and_not_trained(tmp_path: Path) -> None:
    done = Training(run_of(epochs=2), kept=tmp_path)
    progress = done.fit()
    again = Training(run_of(epochs=2))
    assert again.fit(resume=tmp_path) == progress
    assert again.told == progress.history
    assert again.lasts == []
    exactly(again.weights, done.weights)


# --- what must not happen ---------------------------------------------------------------------


def test_a_live_teacher_does_not_change() -> None:
    run = run_of(**TAUGHT)
    teacher = teacher_of(run)
    before = {name: held.clone() for name, held in teacher.state_dict().items()}
    training = Training(run)
    training.fit(teacher=teacher)
    assert not any(module.training for module in teacher.modules())
    exactly(dict(teacher.state_dict()), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    names = {id(parameter) for parameter in training.step.parameters()}
    assert names.isdisjoint(id(parameter) for parameter in teacher.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(bad: float) -> None:
    run = run_of(teacher=TEACHER, losses={"ce": {}, "soft": {"loss": "kd"}})
    rows = rows_of(run, teacher_of(run))
    rows.logits[1, :, 3] = bad
    training = Training(run, rows)
    before = {name: held.clone() for name, held in training.step.named_parameters()}
    with pytest.raises(FloatingPointError, match=r"the loss is nan \(ce = [\d.]+, soft = nan\)"):
        training.fit()
    exactly(dict(training.step.named_parameters()), before)
    assert training.told == []


def test_a_later_loss_that_is_not_finite_keeps_what_was_reported(tmp_path: Path) -> None:
    run = run_of(teacher=TEACHER, losses={"ce": {}, "kd": {}})
    rows = rows_of(run, teacher_of(run))
    rows.logits[2] = np.nan  # the second epoch's view
    training = Training(run, rows, kept=tmp_path)
    with pytest.raises(FloatingPointError, match=r"lower optimizer\.lr"):
        training.fit()
    assert [metrics["epoch"] for metrics in training.told] == [1]
    exactly(load_file(tmp_path / LAST), training.lasts[0])


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="precision fp16 needs a GPU; bf16 and fp32 run anywhere"):
        Training(run_of(precision="fp16")).fit()


def test_bf16_trains_weights_that_stay_float32() -> None:
    training = Training(run_of(precision="bf16", epochs=6, **TAUGHT))
    history = training.fit(teacher=teacher_of(training.run)).history
    assert history[-1]["val/top1"] > 0.5
    assert {held.dtype for held in training.step.parameters()} == {torch.float32}
    exact = Training(run_of(epochs=6, **TAUGHT))
    first = exact.fit(teacher=teacher_of(exact.run)).history[0]
    assert history[0]["train/loss"] != first["train/loss"]
    assert history[0]["train/loss"] == pytest.approx(first["train/loss"], rel=0.05)


def test_a_live_teacher_has_the_precision_of_the_run() -> None:
    def first_kd(precision: str) -> float:
        teacher = {**TEACHER, "precision": precision}
        run = run_of(epochs=1, teacher=teacher, losses={"ce": {}, "kd": {}}, optimizer={"lr": 1e-3})
        return Training(run).fit(teacher=teacher_of(run)).history[0]["train/kd"]

    exact, half = first_kd("fp32"), first_kd("bf16")
    assert half != exact
    assert half == pytest.approx(exact, rel=0.02)


def test_terms_of_weight_0_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def exploding(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
        raise AssertionError("computed")

    monkeypatch.setitem(LOSSES, "kd", Logits(exploding))
    off = Training(run_of(losses={"ce": {}, "soft": {"loss": "kd", "weight": 0}}))
    history = off.fit().history
    control = Training(run_of(losses={"ce": {}}))
    control.fit()
    assert "train/soft" not in history[0]
    exactly(off.weights, control.weights)
    on = run_of(teacher=TEACHER, losses={"ce": {}, "soft": {"loss": "kd", "weight": 0.1}})
    with pytest.raises(ValueError, match=r"losses\.soft: computed"):
        Training(on)


# --- one step, wherever the teacher's outputs come from ---------------------------------------


@pytest.mark.parametrize("key", [key for key in LOSSES if key != "ce"])
def test_cached_rows_train_as_the_live_teacher_does(key: str) -> None:
    layers = {"block3": "block3", **LOSSES[key].default_layers}
    if isinstance(LOSSES[key], Stateful) and not LOSSES[key].default_layers:
        layers["block2"] = "block2"  # it may see several layers together
    named = {"layers": layers} if LOSSES[key].takes_layers else {}
    losses = {"ce": {}, "it": {"loss": key, "weight": 0.1, **named}}
    # a small rate and weight, or training itself would magnify the half precision of the rows
    few = {**BASE["data"], "limit": 60}
    teacher_run = {"run": {**TEACHER["run"], "data": few}}
    run = run_of(teacher=teacher_run, losses=losses, optimizer={"lr": 0.002}, data=few, epochs=1)
    teacher = teacher_of(run)
    live, cached = Training(run), Training(run, rows_of(run, teacher))
    expected, history = live.fit(teacher=teacher).history, cached.fit().history
    for there, here in zip(expected, history, strict=True):
        for name in ("train/loss", "train/it", "train/ce", "val/nll"):
            assert here[name] == pytest.approx(there[name], rel=1e-2), name


def test_the_teacher_s_layers_beyond_the_run_s_do_no_harm() -> None:
    # one cache of the union of layers serves every trial of a sweep
    run = run_of(teacher=TEACHER, losses={"ce": {}, "kd": {}}, epochs=1)
    wide = run_of(**TAUGHT)
    few, more = rows_of(run, teacher_of(run)), rows_of(wide, teacher_of(wide))
    assert set(few.features) < set(more.features)
    one, other = Training(run, few), Training(run, more)
    one.fit()
    other.fit()
    exactly(one.weights, other.weights)
