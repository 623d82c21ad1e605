"""Networks by name, with the run's classes and channels, and with the weights of that network."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from kdcore.models import MODELS
from kdcore.taps import Tapped
from pipelines.datasets import DataConfig
from pipelines.models import (
    Served,
    build_network,
    load_weights,
    read_weights,
    save_weights,
    weights_digest,
)
from pipelines.networks import ModelConfig
from pipelines.sources import read_pictures

KD_DATA = Path(os.environ.get("KD_DATA", Path(__file__).parents[3] / "shared" / "data"))


def build(name: str, **model: Any) -> nn.Module:
    return build_network(ModelConfig(name=name, **model), num_classes=7, in_channels=1)


def small(seed: int = 0, width: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return build("convnet", params={"width": width})


def exactly_the_same(actual: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(actual.state_dict(), expected.state_dict(), rtol=0, atol=0)


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [*MODELS, "resnet18_small", "timm/test_resnet", "timm/test_vit", "torchvision/resnet18"],
)
def test_a_network_has_the_classes_and_channels_of_the_run(name: str) -> None:
    net = build(name).eval()
    size = 160 if name == "timm/test_vit" else 32
    with torch.inference_mode():
        logits = net(torch.randn(2, 1, size, size))
    assert logits.shape == (2, 7)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", ["convnet", "resnet8"])
def test_a_network_learns_all_of_its_parameters(name: str) -> None:
    net = build(name, params={"width": 4})
    net(torch.randn(2, 1, 8, 8)).square().sum().backward()
    for path, parameter in net.named_parameters():
        assert parameter.grad is not None, path
        assert bool((parameter.grad != 0).any()), path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet19", "unknown timm network 'resnet19'; did you mean 'resnet18'?"),
        (
            "torchvision/resnet19",
            "unknown torchvision network 'resnet19'; did you mean 'resnet18'?",
        ),
        ("torchvision/fasterrcnn_resnet50_fpn", "unknown torchvision network 'fasterrcnn"),
    ],
)
def test_an_unknown_network_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(name)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        (
            "convnet",
            {"widht": 3},
            "unknown parameter of network convnet 'widht'; did you mean 'width'",
        ),
        (
            "resnet20",
            {"depth": 8},
            "unknown parameter of network resnet20 'depth'; did you mean 'width'?",
        ),
        ("convnet", {"width": "a"}, "cannot build convnet with params {'width': 'a'}"),
        (
            "timm/test_resnet",
            {"drop_rat": 0.1},
            "cannot build timm/test_resnet with params {'drop_rat",
        ),
        (
            "timm/test_resnet",
            {"pretrained": True},
            "cannot build timm/test_resnet with params {'pretr",
        ),
        (
            "timm/test_resnet",
            {"output_stride": 3},
            "cannot build timm/test_resnet with params {'outpu",
        ),
        (
            "torchvision/resnet18",
            {"widht": 3},
            "cannot build torchvision/resnet18 with params {'widht",
        ),
        (
            "torchvision/resnet18",
            {"num_classes": 3},
            "cannot build torchvision/resnet18 with params",
        ),
    ],
)
def test_parameters_that_the_constructor_does_not_take_are_refused(
    name: str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(name, params=params)


# --- stems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18"])
@pytest.mark.parametrize(("stem", "sizes"), [("original", (8, 1)), ("small", (32, 4))])
def test_a_small_stem_keeps_the_resolution_of_small_pictures(
    name: str, stem: str, sizes: tuple[int, int]
) -> None:
    net = build(name, stem=stem).eval()
    seen: dict[str, tuple[int, ...]] = {}
    for layer in ("layer1", "layer4"):
        module = net.get_submodule(layer)
        module.register_forward_hook(
            lambda _, __, output, layer=layer: seen.update({layer: tuple(output.shape[2:])})
        )
    with torch.inference_mode():
        assert net(torch.randn(1, 1, 32, 32)).shape == (1, 7)
    assert seen == {"layer1": (sizes[0],) * 2, "layer4": (sizes[1],) * 2}


# the published ResNet-18, 34 and 50 for CIFAR-100: 11.22, 21.33 and 23.70 million
@pytest.mark.parametrize(
    ("depth", "published"), [(18, 11_220_132), (34, 21_328_292), (50, 23_705_252)]
)
def test_a_small_resnet_is_torchvisions_with_a_small_stem(depth: int, published: int) -> None:
    def network(**model: Any) -> nn.Module:
        with torch.device("meta"):  # shapes without values: nothing is drawn
            return build_network(ModelConfig(**model), num_classes=100, in_channels=3)

    net = network(name=f"resnet{depth}_small")
    assert sum(parameter.numel() for parameter in net.parameters()) == published
    spelled_out = network(name=f"torchvision/resnet{depth}", stem="small")
    assert str(net) == str(spelled_out)


@pytest.mark.parametrize(("name", "last"), [("resnet18", 1), ("resnet50", 2)])
def test_a_stage_of_torchvisions_resnets_is_the_relu_of_its_preactivation(
    name: str, last: int
) -> None:
    net = build(f"{name}_small").eval()
    layers = ["layer1", f"layer1.{last}.relu.preactivation"]
    with torch.inference_mode():
        after, before = map(Tapped(net, layers)(torch.randn(2, 1, 16, 16)).features.get, layers)
    assert before is not None
    assert bool((before < 0).any())
    torch.testing.assert_close(before.relu(), after, rtol=0, atol=0)


def test_torchvisions_resnets_keep_their_weights_names_and_outputs() -> None:
    theirs, model = resnet18(num_classes=7), ModelConfig(name="torchvision/resnet18")
    ours = build_network(model, num_classes=7, in_channels=3)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["convnet", "resnet20", "timm/test_vit", "torchvision/squeezenet1_1"]
)
def test_a_network_without_such_a_stem_refuses_to_make_it_small(name: str) -> None:
    with pytest.raises(ValueError, match="no stem that can be made small: its first convolution"):
        build(name, stem="small")


# --- weights ----------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "safetensors": save_weights,
    "pth": torch.save,
    "pt": lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),
    # as the teachers of CRD, which DKD and others after it download
    "pth.tar": lambda state, path: torch.save(
        {"epoch": 240, "model": state, "accuracy": torch.tensor(79.4), "optimizer": {"state": {}}},
        path,
    ),
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_loaded_from_every_form(tmp_path: Path, suffix: str, prefix: str) -> None:
    trained, path = small(seed=1), tmp_path / f"net.{suffix}"
    WRITERS[suffix]({prefix + name: held for name, held in trained.state_dict().items()}, path)
    exactly_the_same(build("convnet", params={"width": 2}, weights=path), trained)


def renamed(net: nn.Module, old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): held for name, held in net.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["resnet8", "shufflenet_v2"])
def test_a_classifier_fc_is_read_where_ours_is_called_linear(
    tmp_path: Path, name: str, prefix: str
) -> None:
    trained, path = build(name), tmp_path / "theirs.safetensors"
    state = renamed(trained, "linear.", "fc.")
    assert "fc.weight" in state
    save_weights({prefix + name: held for name, held in state.items()}, path)
    exactly_the_same(build(name, weights=path), trained)


def test_a_classifier_that_the_network_itself_calls_fc_keeps_its_name(tmp_path: Path) -> None:
    trained, path = build("wrn_16_1"), tmp_path / "wrn.safetensors"
    save_weights(trained.state_dict(), path)
    exactly_the_same(build("wrn_16_1", weights=path), trained)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("linear.", "head.", "the file lacks linear.weight"),
        ("downsample.", "shortcut.", "the file lacks layer2.0.downsample.0.weight"),
    ],
)
def test_any_other_name_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    model: dict[str, Any] = {"params": {"shortcut": "projection"}}
    path = tmp_path / "theirs.safetensors"
    save_weights(renamed(build("resnet8", **model), old, new), path)
    with pytest.raises(ValueError, match=re.escape(message)):
        build("resnet8", weights=path, **model)


def test_two_classifiers_in_a_file_are_refused(tmp_path: Path) -> None:
    state, path = build("resnet8").state_dict(), tmp_path / "both.safetensors"
    save_weights({**state, "fc.weight": state["linear.weight"].clone()}, path)
    with pytest.raises(ValueError, match=r"has fc\.weight, unknown to the network"):
        build("resnet8", weights=path)


def test_weights_of_another_network_name_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    save_weights(small(width=3).state_dict(), path)
    message = (
        r"wide\.safetensors are not of this Sequential: the file has block1\.0\.weight of shape "
        r"\(3, 1, 3, 3\), expected \(2, 1, 3, 3\) \(\d+ of 20 tensors do not fit\)"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(small(), path)


def test_weights_with_a_tensor_too_few_or_too_many_name_it(tmp_path: Path) -> None:
    path, state = tmp_path / "net.safetensors", small().state_dict()
    save_weights({name: held for name, held in state.items() if name != "block2.0.weight"}, path)
    with pytest.raises(ValueError, match=r"the file lacks block2\.0\.weight \(1 of 20"):
        load_weights(small(), path)
    save_weights({**state, "aux.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"the file has aux\.weight, unknown to the network"):
        load_weights(small(), path)


def test_a_network_is_left_alone_by_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_weights({**small(seed=1).state_dict(), "aux.weight": torch.ones(1)}, path)
    net = small(seed=0)
    with pytest.raises(ValueError, match="unknown to the network"):
        load_weights(net, path)
    exactly_the_same(net, small(seed=0))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights at .*none\.pth"):
        build("convnet", weights=tmp_path / "none.pth")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("content", [b"", b"hello", b"<!DOCTYPE html>", b"PK\x03\x04broken"])
def test_a_file_that_holds_no_tensors_is_refused_by_name(
    tmp_path: Path, suffix: str, content: bytes
) -> None:
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"weights .*broken\.{suffix} cannot be read as tensors"):
        read_weights(path)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, form: str) -> None:
    path, sprung = tmp_path / "trap.pth", tmp_path / "sprung"
    state = {**small().state_dict(), "extra": Trap(sprung)}
    if form == "zip":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Trap(sprung)}, protocol=2))
    with pytest.raises(ValueError, match=r"trap\.pth cannot be read as tensors only"):
        load_weights(small(), path)
    assert not sprung.exists()
    # the trap does work
    with path.open("rb") as file:
        torch.load(file, weights_only=False) if form == "zip" else pickle.load(file)
    assert sprung.exists()


@pytest.mark.parametrize(
    "content", [{"epoch": 3}, {}, [1], {"state_dict": 3}, {"model": 3}, {1: torch.ones(1)}]
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights .*other\.pth are not"):
        load_weights(small(), path)


# --- digest -----------------------------------------------------------------------------------


class Ordered(nn.Module):
    """The same two tensors, registered in a given order."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            self.register_buffer(name, torch.full((2, 3), float(ord(name))))


def test_the_digest_is_of_names_and_values_and_not_of_their_order() -> None:
    assert weights_digest(Ordered("ab")) == weights_digest(Ordered("ba"))
    assert weights_digest(Ordered("ab")) != weights_digest(Ordered("ac"))
    assert weights_digest(small(seed=1)) == weights_digest(small(seed=1))
    assert weights_digest(small(seed=1)) != weights_digest(small(seed=2))


@pytest.mark.parametrize("name", ["block1.0.weight", "block3.1.num_batches_tracked"])
def test_the_digest_changes_with_one_value(name: str) -> None:
    net = small()
    before = weights_digest(net)
    with torch.no_grad():
        net.state_dict()[name].view(-1)[0] += 1
    assert weights_digest(net) != before


def test_the_digest_changes_with_the_type() -> None:
    net = Ordered("ab").half()
    assert weights_digest(net) != weights_digest(Ordered("ab").bfloat16())
    assert weights_digest(net) != weights_digest(Ordered("ab"))


def test_the_digest_survives_a_file(tmp_path: Path) -> None:
    trained, path = small(seed=1), tmp_path / "net.safetensors"
    save_weights(trained.state_dict(), path)
    net = small()
    load_weights(net, path)
    assert weights_digest(net) == weights_digest(trained)


# --- served -----------------------------------------------------------------------------------


def test_served_takes_pixels_as_they_are_stored() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    net = MODELS["convnet"](7, width=2).eval()
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    served = Served(net, mean=mean, std=std).eval()
    channels = [(pixels[:, c] / 255 - mean[c]) / std[c] for c in range(3)]
    with torch.inference_mode():
        torch.testing.assert_close(served(pixels), net(torch.stack(channels, dim=1)))


# --- the teachers of KD_DATA ------------------------------------------------------------------

RESNET20 = KD_DATA / "teachers" / "cifar10_resnet20.safetensors"


def accuracy_on_cifar10(rows: int) -> float:
    card = json.loads(RESNET20.with_suffix(".json").read_text())
    model = ModelConfig(name="resnet20", weights=RESNET20)
    net = build_network(model, num_classes=10, in_channels=3)
    served = Served(net, mean=tuple(card["mean"]), std=tuple(card["std"])).eval()
    test = read_pictures(DataConfig(name="parquet", root=KD_DATA / "cifar10"), "test")
    right = 0
    with torch.inference_mode():
        for start in range(0, rows, 250):
            logits = served(torch.from_numpy(test.image[start : start + 250]))
            right += int((logits.argmax(dim=1).numpy() == test.label[start : start + 250]).sum())
    return right / rows


needs_teacher = pytest.mark.skipif(
    not (RESNET20.exists() and (KD_DATA / "cifar10").is_dir()), reason="KD_DATA has no teachers"
)


@needs_teacher
def test_a_real_teacher_is_right_on_a_thousand_pictures() -> None:
    assert accuracy_on_cifar10(1000) >= 0.89


@needs_teacher
@pytest.mark.slow
def test_a_real_teacher_reaches_the_accuracy_on_its_card() -> None:
    card = json.loads(RESNET20.with_suffix(".json").read_text())
    expected = card["measured"]["cifar10_test_lossless_top1"]
    assert abs(100 * accuracy_on_cifar10(10_000) - expected) <= 0.05
