"""Tapped: the layers of a network in one pass, and the network untouched by it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kdcore.models import MODELS
from kdcore.taps import Tapped, classifier_name


@pytest.fixture
def net() -> nn.Module:
    return MODELS["convnet"](5, width=2).eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def same(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def num_hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_one_pass_gives_logits_embedding_and_named_layers(net: nn.Module, image: Tensor) -> None:
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))
    outputs = Tapped(net, ["block1", "block3", "block2.0"])(image)
    assert len(passes) == 1
    block1 = net.block1(image)
    block3 = net.block3(net.block2(block1))
    same(outputs.logits, net(image))
    same(
        dict(outputs.features),
        {
            "embedding": block3.mean(dim=(2, 3)),
            "block1": block1,
            "block3": block3,
            "block2.0": net.block2[0](block1),
        },
    )
    same(net.classifier(outputs.features["embedding"]), outputs.logits)


def test_the_embedding_is_always_there_and_may_be_named(net: nn.Module, image: Tensor) -> None:
    for layers in ([], ["embedding"]):
        assert set(Tapped(net, layers)(image).features) == {"embedding"}


@pytest.mark.parametrize("bias", [True, False])
def test_the_classifier_makes_the_logits_of_the_embedding(
    net: nn.Module, image: Tensor, bias: bool
) -> None:
    net.classifier = nn.Linear(8, 5, bias=bias)
    outputs = Tapped(net)(image)
    assert outputs.classifier is not None
    weight, added = outputs.classifier
    torch.testing.assert_close(outputs.logits, outputs.features["embedding"] @ weight.T + added)
    weight.sum().backward()
    assert net.classifier.weight.grad is not None


def test_a_layer_named_twice_is_tapped_once(net: nn.Module, image: Tensor) -> None:
    assert Tapped(net, ["block1", "block1"]).layers == ("block1",)


def test_a_feature_is_the_output_of_its_own_module_although_the_next_works_in_place(
    net: nn.Module, image: Tensor
) -> None:
    normalised = net.block1[1](net.block1[0](image))
    assert bool((normalised < 0).any())  # the ReLU after it is in place
    same(Tapped(net, ["block1.1"])(image).features["block1.1"], normalised)


def test_the_gradient_of_a_feature_reaches_the_layers_before_it_alone(
    net: nn.Module, image: Tensor
) -> None:
    outputs = Tapped(net, ["block1"])(image)
    outputs.features["block1"].square().sum().backward(retain_graph=True)
    assert bool((net.block1[0].weight.grad != 0).any())
    assert net.block2[0].weight.grad is None
    outputs.features["embedding"].square().sum().backward()
    assert bool((net.block3[0].weight.grad != 0).any())
    assert net.classifier.weight.grad is None


def test_a_layer_may_go_by_an_alias(net: nn.Module, image: Tensor) -> None:
    outputs = Tapped(net, ["deep", "block1"], aliases={"deep": "block2.0"})(image)
    same(outputs.features["deep"], Tapped(net, ["block2.0"])(image).features["block2.0"])
    assert set(outputs.features) == {"deep", "block1", "embedding"}


@pytest.mark.parametrize(("name", "nearest"), [("blok2", "block2"), ("embeding", "embedding")])
def test_an_unknown_layer_is_refused_with_the_nearest_name(
    net: nn.Module, name: str, nearest: str
) -> None:
    with pytest.raises(ValueError, match=f"layer of Sequential '{name}'; did you mean '{nearest}'"):
        Tapped(net, ["block1", name])


def test_a_network_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Conv2d has no nn\.Linear"):
        Tapped(nn.Conv2d(3, 3, 1))


def test_the_classifier_is_the_last_linear_layer_however_deep(net: nn.Module) -> None:
    assert classifier_name(nn.Sequential(nn.Linear(2, 2), net)) == "1.classifier"
    assert classifier_name(nn.Linear(2, 2)) == ""


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_and_pickles_give_the_same_outputs(
    net: nn.Module, image: Tensor, copied: Callable[[nn.Module], nn.Module]
) -> None:
    tapped = Tapped(net, ["block1"])
    expected = tapped(image)
    twin = copied(tapped)
    same(dict(twin(image).features), dict(expected.features))
    same(copied(net)(image), expected.logits)
    assert twin.net is not net


def test_the_state_dict_of_the_network_keeps_its_names(net: nn.Module, image: Tensor) -> None:
    before = copy.deepcopy(net.state_dict())
    Tapped(net, ["block1"])(image)
    same(net.state_dict(), before)


def test_no_hook_is_left_after_a_pass_nor_after_one_that_failed(
    net: nn.Module, image: Tensor
) -> None:
    tapped = Tapped(net, ["block1", "block3"])
    tapped(image)
    assert num_hooks(tapped) == 0
    with pytest.raises(RuntimeError, match="expected input"):
        tapped(torch.randn(4, 1, 8, 8))
    assert num_hooks(tapped) == 0


def test_a_second_pass_leaves_the_outputs_of_the_first(net: nn.Module, image: Tensor) -> None:
    tapped = Tapped(net, ["block1"])
    first = tapped(image)
    kept = {name: feature.clone() for name, feature in first.features.items()}
    tapped(torch.randn(2, 3, 8, 8))
    same(dict(first.features), kept)


def test_two_taps_of_one_network_do_not_meet(net: nn.Module, image: Tensor) -> None:
    first, second = Tapped(net, ["block1"]), Tapped(net, ["block2"])
    assert set(first(image).features) == {"embedding", "block1"}
    assert set(second(image).features) == {"embedding", "block2"}


def test_taps_work_under_a_wrapper_and_around_one(net: nn.Module, image: Tensor) -> None:
    class Wrapper(nn.Module):  # as DDP: keeps the module, prefixes its names, calls it
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Tensor) -> object:
            return self.module(*inputs)

    expected = Tapped(net, ["block1"])(image)
    same(dict(Wrapper(Tapped(net, ["block1"]))(image).features), dict(expected.features))
    around = Tapped(Wrapper(net), ["module.block1"])(image)
    same(around.features["module.block1"], expected.features["block1"])
    same(around.features["embedding"], expected.features["embedding"])
