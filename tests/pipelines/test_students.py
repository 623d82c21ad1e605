"""Students that are trained in another form than they are used in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.kdiffusion.parallel import Branches
from kdcore.quantisation import IntegerConv2d
from kdcore.taps import Tapped
from pipelines import jobs
from pipelines.build import build_step, build_student, build_teacher, build_used, checked
from pipelines.config import RunConfig
from pipelines.data import Reader
from pipelines.digests import plain
from pipelines.exports import exported
from pipelines.loop import Metrics, evaluate
from pipelines.models import build_network, load_weights, save_weights
from pipelines.networks import ModelConfig
from pipelines.sources import Pictures, read_pictures
from pipelines.strict import validated
from pipelines.train import Finished, Inputs, Teacher, train_here
from pipelines.training import with_teachers

CPU = torch.device("cpu")
CONVNET = {"name": "convnet", "params": {"width": 2}}
TEACHER: dict[str, Any] = {"name": "convnet", "params": {"width": 3}}
BASE: dict[str, Any] = {
    "student": CONVNET,
    "data": {"name": "digits", "limit": 100, "validation": 0.2},
    "epochs": 1,
    "batch_size": 16,
    "optimizer": {"lr": 0.01},
    "losses": {"ce": {}},
}
PAIR = {"layer": "block3", "teacher_layer": "block3"}
# how the student is trained, and the loss that is meant for it
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reuse": (
        {"reuse": PAIR},
        {"ce": {"weight": 0}, "simkd": {"layers": {"projector": "block3"}}},
    ),
    "expand": ({"expand": PAIR}, {"ce": {}, "norm": {"layers": {"expand": "block3"}}}),
    "branches": (
        {"branches": {"stages": ["block2", "block3"], "count": 3, "kinds": ["same", "1x1"]}},
        {"ce": {}, "kdiffusion": {"layers": {"block3.branches": "block3"}}},
    ),
    "quantise": ({"quantise": {"bits": 8}}, {"ce": {}, "kd": {}}),
}


def run_of(form: str, **changes: Any) -> RunConfig:
    student, losses = FORMS[form]
    teacher = {"run": {**BASE, "student": TEACHER}, "source": "live"}
    content = {**BASE, "student": {**CONVNET, **student}, "teacher": teacher, "losses": losses}
    return validated(RunConfig, {**content, **changes}, where="toy")


def pictures_of(run: RunConfig) -> Pictures:
    return read_pictures(run.data, "train")


def inputs_of(run: RunConfig) -> Inputs:
    pictures = pictures_of(run)
    torch.manual_seed(5)  # another teacher than the blank one of the probe
    layers = run.teacher_layers["run"]
    live = build_teacher(run.teachers["run"], pictures, layers)
    for held in live.parameters():
        held.data.normal_(std=0.3)
    return Inputs(pictures, {"run": Teacher(Path("none"), live=live)})


def trained(run: RunConfig, inputs: Inputs) -> Finished:
    def no_word(metrics: Metrics) -> None:
        pass

    return train_here(run, inputs, no_word)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 1, 8, 8)


@pytest.fixture(autouse=True)
def folder(workdir: Path) -> Path:
    return workdir


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_what_is_used_computes_what_was_trained(form: str) -> None:
    run = run_of(form)
    inputs = inputs_of(run)
    result = trained(run, inputs)
    as_trained = build_student(run, inputs.pictures)
    load_weights(as_trained.net, result.weights)
    used = build_used(run, inputs.pictures, result.weights)
    image = images()
    torch.testing.assert_close(used(image), as_trained.eval()(image).logits)


def test_what_is_logged_and_exported_is_fused() -> None:
    run = run_of("branches")
    inputs = inputs_of(run)
    served = jobs.served_student(run, trained(run, inputs), inputs.pictures)
    assert [path for path, module in served.named_modules() if isinstance(module, Branches)] == []


def test_what_is_tested_and_exported_has_bytes_for_weights(tmp_path: Path) -> None:
    run = run_of("quantise")
    inputs = inputs_of(run)
    result = trained(run, inputs)
    served = jobs.served_student(run, result, inputs.pictures)
    held = [one.integers for one in served.modules() if isinstance(one, IntegerConv2d)]
    assert [one.dtype for one in held] == [torch.int8] * 3
    assert len(exported(served, inputs.pictures.image[:2], tmp_path)) == 2
    used = Tapped(build_used(run, inputs.pictures, result.weights))
    of_bytes = evaluate(used, Reader(run, inputs.pictures).validation(), device=CPU)
    assert of_bytes["val/top1"] == result.best["val/top1"]


def test_a_student_of_few_bits_may_start_from_one_of_floating_point(tmp_path: Path) -> None:
    path = tmp_path / "float.safetensors"
    net = build_network(ModelConfig(**CONVNET), num_classes=10, in_channels=1)
    save_weights(net.state_dict(), path)
    run = run_of("quantise", student={**CONVNET, "weights": str(path), "quantise": {}})
    state = build_student(run, pictures_of(run)).net.state_dict()
    for name, held in net.state_dict().items():
        torch.testing.assert_close(state[name], held, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["expand", "branches"])
def test_what_is_used_loads_into_the_plain_network(form: str) -> None:
    run = run_of(form)
    used = build_used(run, pictures_of(run), None)
    net = build_network(ModelConfig(**CONVNET), num_classes=10, in_channels=1).eval()
    net.load_state_dict(used.state_dict())
    image = images()
    torch.testing.assert_close(net(image), used(image), rtol=0, atol=0)


def test_a_reusing_student_ends_in_the_classifier_of_the_real_teacher() -> None:
    run = run_of("reuse")
    inputs = inputs_of(run)
    used = Tapped(build_used(run, inputs.pictures, trained(run, inputs).weights))
    live = inputs.teachers["run"].live
    assert live is not None
    torch.testing.assert_close(used.head, live.head, rtol=0, atol=0)


def test_every_parameter_that_asks_for_a_gradient_gets_one(form: str) -> None:
    every_gradient_is_there(run_of(form))


def test_what_stands_above_a_reused_map_asks_for_no_gradient() -> None:
    student = {**CONVNET, "reuse": {**PAIR, "layer": "block2"}}
    every_gradient_is_there(run_of("reuse", student=student))


def every_gradient_is_there(run: RunConfig) -> None:
    """Else DDP would wait for it."""
    inputs = inputs_of(run)
    step = build_step(run, inputs.pictures, inputs.classifiers)
    teacher = inputs.teachers["run"].live
    assert teacher is not None
    batches = Reader(run, inputs.pictures).train(0)
    batch = next(with_teachers(run, batches, {"run": teacher}, torch.device("cpu")))
    step(batch).loss.backward()
    asking = {name for name, held in step.named_parameters() if held.requires_grad}
    assert {name for name, held in step.named_parameters() if held.grad is not None} == asking


def test_the_layers_of_the_plain_network_keep_their_names(form: str) -> None:
    run = run_of(form)
    losses = plain(run)["losses"] | {"more": {"loss": "mse", "layers": {"block1": "block1"}}}
    step = build_step(run_of(form, losses=losses), pictures_of(run))
    assert step.student(images()).features["block1"].shape[:2] == (4, 2)


def test_such_a_student_can_be_a_teacher(form: str) -> None:
    run = run_of(form)
    weights = trained(run, inputs_of(run)).weights
    taught = {**BASE, "teacher": {"run": plain(run)}, "losses": {"ce": {}, "kd": {}}}
    other = validated(RunConfig, taught, where="toy")
    checked(other)
    teacher = build_teacher(other.teachers["run"], pictures_of(run), (), weights=weights)
    image = images()
    used = build_used(run, pictures_of(run), weights)
    torch.testing.assert_close(teacher(image).logits, used(image))


def test_a_form_changes_the_identity_and_none_does_not() -> None:
    bare = validated(RunConfig, BASE, where="toy")
    assert "branches" not in plain(bare)["student"]
    identities = {run_of(form, losses={"ce": {}}).identity for form in FORMS}
    assert len(identities | {bare.identity}) == len(FORMS) + 1


def test_a_multiplier_of_no_layer_is_refused_before_training() -> None:
    run = run_of("branches", optimizer={"lr": 0.01, "multipliers": {"block9": 0.1}})
    with pytest.raises(ValueError, match="student: unknown layer 'block9'; did you mean 'block"):
        checked(run)


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ({"reuse": PAIR, "branches": {"stages": ["block3"]}}, {}, "student: expected one of"),
        ({"branches": {"stages": ["block9"]}}, {}, "student: .*block9"),
        ({"branches": {"stages": ["block3"], "kinds": ["round"]}}, {}, "student.branches.kinds"),
        ({"expand": {**PAIR, "layer": "block7"}}, {}, "student: .*block7.*block3"),
        ({"expand": {**PAIR, "teacher_layer": "block7"}}, {}, "teacher: .*block7.*block3"),
        ({"expand": {**PAIR, "layer": "embedding"}}, {}, "student: expected a map .B, C, H, W."),
        ({"reuse": {**PAIR, "teacher": "other"}}, {}, "student.reuse.teacher: .*other"),
        (
            {"expand": {**PAIR, "layer": "block2"}},
            {},
            "the student's classifier reads something else than the mean of 'block2'",
        ),
        (
            {"reuse": {**PAIR, "teacher_layer": "block2"}},
            {},
            "the teacher's classifier reads something else than the mean of 'block2'",
        ),
        ({"reuse": PAIR}, {"teacher": None}, "student.reuse needs a teacher"),
    ],
)
def test_a_form_that_cannot_be_is_refused(
    student: dict[str, Any], teacher: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        checked(run_of("expand", student={**CONVNET, **student}, losses={"ce": {}}, **teacher))
