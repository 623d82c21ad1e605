"""A run's step: the student, and terms that know the shapes which they will meet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kdcore.losses import LOSSES, Stateful
from kdcore.schedules import Cosine, Warmup
from kdcore.step import DistillStep
from kdcore.types import Batch
from pipelines.build import build_step, build_student, build_teacher, checked
from pipelines.config import RunConfig, TeacherConfig
from pipelines.models import build_network, save_weights
from pipelines.sources import Pictures
from pipelines.space import changed
from pipelines.strict import validated

PICTURES = Pictures(np.zeros((20, 1, 8, 8), dtype=np.uint8), np.arange(20) % 5, 5)
BASE: dict[str, Any] = {
    "student": {"name": "convnet", "params": {"width": 2}},
    "data": {"name": "digits"},
    "epochs": 1,
    "batch_size": 4,
    "losses": {"ce": {}},
}
WIDER = {"run": {**BASE, "student": {"name": "resnet8", "params": {"width": 3}}}}


def run_of(losses: dict[str, Any], **changes: Any) -> RunConfig:
    content = {**BASE, "teacher": WIDER, "losses": losses, **changes}
    return validated(RunConfig, content, where="toy")


def step_of(losses: dict[str, Any], **changes: Any) -> DistillStep:
    return build_step(run_of(losses, **changes), PICTURES)


def batch_of(run: RunConfig) -> Batch:
    torch.manual_seed(3)
    image = torch.randn(4, 1, 8, 8)
    ((label, teacher),) = run.teachers.items()
    tapped = build_teacher(teacher, PICTURES, run.teacher_layers.get(label, ()))
    return Batch(image, torch.tensor([0, 1, 2, 3]), torch.arange(4), tapped(image))


def shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters()]


def test_a_student_of_another_width_gets_projectors() -> None:
    layers = {"block1": "layer1", "block3": "layer3", "embedding": "embedding"}
    step = step_of({"ce": {}, "mid": {"loss": "mse", "layers": layers}, "kd": {}})
    assert shapes(step.terms["mid"]) == [(3, 2, 1, 1), (12, 8, 1, 1), (12, 8)]
    assert shapes(step.terms["kd"]) == shapes(step.terms["ce"]) == []
    assert step.weights == {"ce": 1, "mid": 1, "kd": 0.9}
    run = run_of({"mid": {"loss": "mse", "layers": layers}})
    step = build_step(run, PICTURES)
    step(batch_of(run)).loss.backward()
    for name, parameter in step.terms.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_a_student_of_the_same_width_gets_none() -> None:
    same = {"run": BASE}
    step = step_of({"mid": {"loss": "mse", "layers": {"block1": "block1"}}}, teacher=same)
    assert shapes(step.terms) == []


def named(key: str) -> dict[str, Any]:
    """The layers of a loss that has no default: two stages where it may see several together."""
    loss = LOSSES[key]
    if not loss.takes_layers or loss.default_layers:
        return {}
    both = {"block2": "layer2", "block3": "layer3"}
    return {"layers": both if isinstance(loss, Stateful) else {"block3": "layer3"}}


@pytest.mark.parametrize("key", LOSSES)
def test_a_step_of_every_loss_gives_a_finite_gradient(key: str) -> None:
    run = run_of({"it": {"loss": key, "weight": 1, **named(key)}, "ce": {"weight": 0.5}})
    step = build_step(run, PICTURES)
    result = step(batch_of(run))
    result.loss.backward()
    assert set(result.parts) == {"it", "ce"}
    torch.testing.assert_close(result.loss.detach(), result.parts["it"] + 0.5 * result.parts["ce"])
    for name, parameter in step.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("key", [key for key in LOSSES if isinstance(LOSSES[key], Stateful)])
def test_blank_pictures_leave_no_trace_in_a_term(key: str) -> None:
    step = step_of({"it": {"loss": key, **named(key)}, "ce": {}})
    assert step.terms["it"].training
    for name, held in step.terms.named_buffers():
        if name.endswith(("count", "num_batches_tracked")):
            assert int(held.sum()) == 0, name


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"blok1": "layer1"}, r"^student: unknown layer of Sequential 'blok1'; did you mean 'bl"),
        ({"block1": "layr1"}, r"^teacher: unknown layer of _CifarResNet 'layr1'; did you mean 'l"),
        (
            {"block1": "embedding"},
            r"^losses\.mid: layers 'block1': 'embedding': .*got \(2, 2, 8, 8\) from the student and"
            r" \(2, 12\) from the teacher",
        ),
        ({"embedding": "layer1"}, r"^losses\.mid: layers 'embedding': 'layer1': "),
    ],
)
def test_layers_that_cannot_be_compared_are_refused_by_place(
    layers: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        step_of({"ce": {}, "mid": {"loss": "mse", "layers": layers}})


def test_networks_that_cannot_be_built_are_refused_by_place() -> None:
    model = {"name": "convnet", "params": {"widht": 3}}
    with pytest.raises(ValueError, match=r"^student: unknown parameter of network convnet 'widht'"):
        step_of({"ce": {}}, student=model)
    with pytest.raises(ValueError, match=r"^teacher: student: unknown parameter of network"):
        step_of({"kd": {}}, teacher={"run": {**BASE, "student": model}})


def test_a_test_part_of_other_pictures_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for number in range(2):
        (tmp_path / "train" / f"class{number}").mkdir()
        Image.new("L", (8, 8)).save(tmp_path / "train" / f"class{number}" / "a.png")
    data = {"name": "folder", "root": str(tmp_path), "test": {"name": "digits"}}
    run = run_of({"ce": {}}, teacher=None, data=data)
    message = r"^data.test has 10 classes .*, and the .* 2 classes of .*; set data.size where"
    with pytest.raises(ValueError, match=message):
        checked(run)


@pytest.mark.parametrize("label", ["values", "train", "type", "training", "loss", "top1"])
def test_a_label_that_is_another_thing_s_name_is_refused(label: str) -> None:
    # of torch's ModuleDict, which holds the terms, or of a metric that every run has
    with pytest.raises(ValueError, match=label):
        step_of({"ce": {}, label: {"loss": "kd"}})


def test_only_cross_entropy_is_called_ce() -> None:
    # or the classifier would have no gradient
    with pytest.raises(ValueError, match="ce"):
        step_of({"ce": {"loss": "mse"}})


def test_terms_without_weight_are_not_built_and_need_no_teacher() -> None:
    off = {"ce": {}, "kd": {"weight": 0}, "mid": {"loss": "mse", "weight": 0}}
    assert list(step_of(off, teacher=None).terms) == ["ce"]
    assert list(step_of({"ce": {"weight": 0}, "kd": {}}).terms) == ["ce", "kd"]


@pytest.mark.parametrize(
    "losses",
    [
        {"kd": {}},
        {"mid": {"loss": "mse", "layers": {"block1": "layer1"}}},
        {"w2": {}, "ce": {}, "kd": {"weight": 2}},
    ],
)
def test_a_seed_gives_one_student_whatever_the_losses(losses: dict[str, Any]) -> None:
    control = build_student(run_of({"ce": {}}), PICTURES).state_dict()
    torch.manual_seed(1234)
    student = step_of(losses).student.state_dict()
    torch.testing.assert_close(student, control, rtol=0, atol=0)


def test_another_seed_gives_another_student() -> None:
    first, second = (build_student(run_of({"ce": {}}, seed=seed), PICTURES) for seed in (0, 1))
    name = "net.block1.0.weight"
    assert bool((first.state_dict()[name] != second.state_dict()[name]).all())


def test_a_run_of_one_identity_has_one_step_whatever_the_order_of_its_losses() -> None:
    first = {"loss": "mse", "layers": {"block1": "layer1"}}
    second = {"loss": "mse", "layers": {"block2": "layer2"}}
    one, other = run_of({"a": first, "b": second}), run_of({"b": second, "a": first})
    assert one.identity == other.identity
    states = [build_step(run, PICTURES).state_dict() for run in (one, other)]
    torch.testing.assert_close(dict(states[0]), dict(states[1]), rtol=0, atol=0)


def test_the_probe_needs_no_weights_of_the_teacher_but_the_teacher_does(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    model = TeacherConfig(name="resnet8", weights=path, params={"width": 3})
    run = run_of({"kd": {}}, teacher=model.model_dump())
    assert list(build_step(run, PICTURES).terms) == ["kd"]
    with pytest.raises(ValueError, match=r"^teacher: no weights at .*teacher\.safetensors"):
        build_teacher(model, PICTURES, ())
    bare = model.network.model_copy(update={"weights": None})
    trained = build_network(bare, num_classes=5, in_channels=1)
    save_weights(trained.state_dict(), path)
    teacher = build_teacher(model, PICTURES, ("layer1",))
    torch.testing.assert_close(teacher.net.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_a_teacher_is_frozen_and_tapped() -> None:
    teacher = build_teacher(run_of({"kd": {}}).teachers["run"], PICTURES, ("layer1", "embedding"))
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    outputs = teacher(torch.zeros(2, 1, 8, 8))
    assert set(outputs.features) == {"layer1", "embedding"}
    assert not outputs.logits.requires_grad


def test_a_student_starts_from_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    start = build_student(run_of({"ce": {}}, seed=9), PICTURES).net
    save_weights(start.state_dict(), path)
    student = {"name": "convnet", "params": {"width": 2}, "weights": str(path)}
    built = step_of({"ce": {}}, student=student).student.net
    torch.testing.assert_close(built.state_dict(), start.state_dict(), rtol=0, atol=0)


def test_bounds_between_embeddings_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"diagnostics\.bounds compares embeddings of one width"):
        step_of({"kd": {}}, diagnostics={"bounds": True})


COOLING = {"steps": {0: 4, 5: 1}}


def test_weights_and_parameters_may_follow_schedules_over_the_run() -> None:
    losses = {
        "ce": {"weight": {"cosine": [1, 0.5]}},
        "kd": {
            "weight": {"warmup": 2, "to": 3},
            "params": {"temperature": {"steps": {0: 4, 5: 1}}},
        },
    }
    step = step_of(losses, epochs=10)
    assert step.weights == {"ce": Cosine(1.0, 0.5, 10.0), "kd": Warmup(3.0, 2.0)}
    run = run_of(losses, epochs=10)
    assert changed(run, {"losses.kd.weight.to": 2}).losses["kd"].weight.to == 2
    early, late = (
        step(replace(batch_of(run), epoch=epoch)).parts["kd"].item() for epoch in (1.0, 6.0)
    )
    softened = step_of({"kd": {"params": {"temperature": 4}}})(batch_of(run)).parts["kd"].item()
    assert early == pytest.approx(softened)
    assert late != pytest.approx(softened)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ({"warmup": 2, "cosine": [0, 1]}, "expected one of warmup, cosine, steps"),
        ({"steps": {3: 1.0}}, "expected a value for epoch 0"),
        ({"cosine": [1, -1]}, "a weight is never below 0"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(weight: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run_of({"kd": {"weight": weight}})
