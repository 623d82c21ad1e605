"""The networks of the table: their sizes as published, their layers, and that they train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore.models import MODELS
from kdcore.models.resnet import cifar_resnet, cifar_resnet_x4
from kdcore.models.shufflenet import channel_shuffle
from kdcore.models.wide_resnet import wide_resnet
from kdcore.taps import Tapped


def num_parameters(name: str, num_classes: int, **params: Any) -> int:
    net = MODELS[name](num_classes, **params)
    return sum(parameter.numel() for parameter in net.parameters())


def same(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def features(net: nn.Module, *layers: str) -> Mapping[str, Tensor]:
    """The named layers, for two random pictures of 32x32."""
    with torch.no_grad():
        return Tapped(net.eval(), layers)(torch.randn(2, 3, 32, 32)).features


# --- sizes ------------------------------------------------------------------------------------


# He et al. 2016, table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million; to the digit, what public
# reproductions with shortcut option A count
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)
def test_a_resnet_has_its_published_number_of_parameters(name: str, published: int) -> None:
    assert num_parameters(name, 10) == published


# counted on the classes that Tian, Krishnan & Isola 2020 (CRD, arXiv:1910.10699) published and the
# tables since then use; public reproductions of the three in the middle print 0.278, 0.473, 0.862
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet8", 83_892),
        ("resnet20", 278_324),
        ("resnet32", 472_756),
        ("resnet56", 861_620),
        ("resnet110", 1_736_564),
    ],
)
def test_a_resnet_with_projections_has_the_distillation_tables_number_of_parameters(
    name: str, published: int
) -> None:
    assert num_parameters(name, 100, shortcut="projection") == published


# the same classes, counted; rounded to 1.23, 7.43, 0.18, 0.70, 0.57, 2.26, 3.97, 9.46, 0.81, 0.95
# and 1.36 million
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet8x4", 1_233_540),
        ("resnet32x4", 7_433_860),
        ("wrn_16_1", 180_916),
        ("wrn_16_2", 703_284),
        ("wrn_40_1", 569_780),
        ("wrn_40_2", 2_255_156),
        ("vgg8", 3_965_028),
        ("vgg13", 9_462_180),
        ("mobilenet_v2", 812_836),
        ("shufflenet_v1", 949_258),
        ("shufflenet_v2", 1_355_528),
    ],
)
def test_a_network_of_the_distillation_tables_has_its_number_of_parameters(
    name: str, published: int
) -> None:
    assert num_parameters(name, 100) == published


# Zagoruyko & Komodakis 2016, arXiv:1605.07146, the table of depths and widths on CIFAR
@pytest.mark.parametrize(("name", "millions"), [("wrn_40_1", 0.6), ("wrn_40_2", 2.2)])
def test_a_wide_resnet_has_its_paper_s_number_of_parameters(name: str, millions: float) -> None:
    assert round(num_parameters(name, 10) / 1e6, 1) == millions


@pytest.mark.parametrize("depth", [8, 14, 20, 110])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_a_resnet_has_the_number_of_parameters_of_its_formula(depth: int, num_classes: int) -> None:
    def layer(inside: int, outside: int) -> int:
        return 9 * inside * outside + 2 * outside  # 3x3 without bias, then BatchNorm

    expected, inside = layer(3, 16), 16
    for width in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            expected += layer(inside, width) + layer(width, width)
            inside = width
    assert num_parameters(f"resnet{depth}", num_classes) == expected + (64 + 1) * num_classes


@pytest.mark.parametrize("depth", [9, 2, 0, -4, 18])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth: int) -> None:
    for make in (cifar_resnet, cifar_resnet_x4):
        with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2 .* got {depth}"):
            make(depth, 10)


@pytest.mark.parametrize("depth", [20, 4, 0, -2, 17])
def test_a_depth_that_is_not_6n_plus_4_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 4 .* got {depth}"):
        wide_resnet(depth, 2, 10)


@pytest.mark.usefixtures("without_shape_checks")
def test_an_unknown_shortcut_is_refused() -> None:
    shortcut: Any = "A"
    with pytest.raises(ValueError, match="'zero_padding' or 'projection', got 'A'"):
        cifar_resnet(8, 10, shortcut=shortcut)


# --- layers -----------------------------------------------------------------------------------

# channels and height of the layers that the literature compares, for pictures of 32x32
STAGES: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "resnet8": {"layer1": (16, 32), "layer2": (32, 16), "layer3": (64, 8)},
    "resnet8x4": {"layer1": (64, 32), "layer2": (128, 16), "layer3": (256, 8)},
    "wrn_16_1": {"block1": (16, 32), "block2": (32, 16), "block3": (64, 8)},
    "wrn_40_2": {"block1": (32, 32), "block2": (64, 16), "block3": (128, 8)},
    "vgg8": {"block0": (64, 32), "block1": (128, 16), "block2": (256, 8), "block4": (512, 4)},
    "vgg13": {"block0": (64, 32), "block1": (128, 16), "block2": (256, 8), "block3": (512, 4)},
    "mobilenet_v2": {"blocks.1": (12, 16), "blocks.2": (16, 8), "blocks.4": (48, 4)}
    | {"blocks.6": (160, 2), "conv2": (1280, 2)},
    "shufflenet_v1": {"layer1": (240, 16), "layer2": (480, 8), "layer3": (960, 4)},
    "shufflenet_v2": {"layer1": (116, 16), "layer2": (232, 8), "layer3": (464, 4)},
}

# the layer before the last ReLU of another
BEFORE_RELU: Mapping[str, Mapping[str, str]] = {
    "convnet": {f"block{i}.1": f"block{i}" for i in (1, 2, 3)},
    "resnet8": {f"layer{i}.0.preactivation": f"layer{i}" for i in (1, 2, 3)},
    "resnet20": {f"layer{i}.2.preactivation": f"layer{i}" for i in (1, 2, 3)},
    "resnet8x4": {f"layer{i}.0.preactivation": f"layer{i}" for i in (1, 2, 3)},
    "resnet32x4": {f"layer{i}.4.preactivation": f"layer{i}" for i in (1, 2, 3)},
    "vgg8": {f"block{i}.1": f"block{i}" for i in range(5)},
    "vgg13": {f"block{i}.4": f"block{i}" for i in range(5)},
    "mobilenet_v2": {"conv1.1": "conv1", "conv2.1": "conv2"},
    "shufflenet_v1": {"layer1.3.preactivation": "layer1", "layer2.7.preactivation": "layer2"}
    | {"layer3.3.preactivation": "layer3"},
    "shufflenet_v2": {"layer1.3.preactivation": "layer1", "layer2.7.preactivation": "layer2"}
    | {"layer3.3.preactivation": "layer3"},
}


@pytest.mark.parametrize("name", STAGES)
def test_the_stages_have_their_published_widths_and_resolutions(name: str) -> None:
    seen = features(MODELS[name](5), *STAGES[name])
    for layer, (channels, height) in STAGES[name].items():
        assert seen[layer].shape == (2, channels, height, height), layer


@pytest.mark.parametrize("name", BEFORE_RELU)
def test_a_layer_is_the_relu_of_the_layer_before_it(name: str) -> None:
    seen = features(MODELS[name](5), *BEFORE_RELU[name], *BEFORE_RELU[name].values())
    for before, after in BEFORE_RELU[name].items():
        assert bool((seen[before] < 0).any()), before
        same(F.relu(seen[before]), seen[after])


def test_the_relu_of_a_wide_resnets_stage_follows_the_next_stages_first_norm() -> None:
    net = MODELS["wrn_40_2"](5)
    seen = features(net, "block1", "block2.layer.0.bn1", "block2.layer.0.conv1", "block3", "bn1")
    assert bool((seen["block1"] < 0).any())
    same(seen["block2.layer.0.bn1"], net.block2.layer[0].bn1(seen["block1"]))
    active = F.relu(seen["block2.layer.0.bn1"])
    same(seen["block2.layer.0.conv1"], net.block2.layer[0].conv1(active))
    same(seen["bn1"], net.bn1(seen["block3"]))
    same(F.relu(seen["bn1"]).mean(dim=(2, 3)), seen["embedding"])


def test_the_last_relu_of_shufflenet_v2_follows_its_last_norm() -> None:
    seen = features(MODELS["shufflenet_v2"](5), "bn2")
    same(F.relu(seen["bn2"]).mean(dim=(2, 3)), seen["embedding"])


@pytest.mark.parametrize("name", ["blocks.1", "blocks.2", "blocks.4", "blocks.6"])
def test_no_relu_follows_a_stage_of_mobilenet(name: str) -> None:
    assert bool((features(MODELS["mobilenet_v2"](5), name)[name] < 0).any())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_ends_in_one_linear_layer_whose_input_is_the_embedding(name: str) -> None:
    net = MODELS[name](5).eval()
    (linear,) = (module for module in net.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        outputs = Tapped(net)(torch.randn(2, 3, 16, 16))
    embedding = outputs.features["embedding"]
    assert embedding.shape == (2, linear.in_features)
    same(F.linear(embedding, linear.weight, linear.bias), outputs.logits)


# --- blocks: a silenced branch leaves the shortcut --------------------------------------------


def test_a_narrowing_shortcut_strides_and_pads_with_zero_channels() -> None:
    block = cifar_resnet(8, 10, width=2).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(3, 2, 6, 6)
    nothing = torch.zeros(3, 1, 3, 3)
    expected = torch.cat([nothing, x[:, :, ::2, ::2], nothing], dim=1)
    torch.testing.assert_close(block(x), expected)


def test_a_projection_reads_every_second_pixel_and_is_normalised() -> None:
    block = cifar_resnet(8, 10, width=2, shortcut="projection").layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)
    convolution, norm = block.downsample
    norm.running_mean.fill_(0.5)
    x = torch.randn(3, 2, 6, 6)
    expected = torch.zeros(3, 4, 3, 3)
    for channel in range(4):
        for inside in range(2):
            expected[:, channel] += convolution.weight[channel, inside] * x[:, inside, ::2, ::2]
    expected = F.relu((expected - 0.5) / (1 + norm.eps) ** 0.5)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("shortcut", ["zero_padding", "projection"])
def test_only_a_stage_that_adds_channels_has_more_than_an_identity(shortcut: Any) -> None:
    net = cifar_resnet(14, 10, shortcut=shortcut)
    kinds = [type(block.downsample) for stage in (net.layer1, net.layer2) for block in stage]
    assert [kind is nn.Identity for kind in kinds] == [True, True, False, True]


def test_a_wide_block_of_equal_width_adds_its_input_as_it_came() -> None:
    block = wide_resnet(10, 1, 10).block1.layer[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 4, 4)
    same(block(x), x)


def test_a_wide_block_that_widens_projects_its_activation() -> None:
    block = wide_resnet(10, 1, 10).block2.layer[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 4, 4)
    activation = F.relu(x / (1 + block.bn1.eps) ** 0.5)[:, :, ::2, ::2]
    weight = block.convShortcut.weight[:, :, 0, 0]
    torch.testing.assert_close(block(x), torch.einsum("dc,bchw->bdhw", weight, activation))


@pytest.mark.parametrize(("number", "adds"), [(0, False), (1, True)])
def test_a_mobilenet_block_adds_its_input_where_the_shapes_agree(number: int, adds: bool) -> None:
    block = MODELS["mobilenet_v2"](10).blocks[1][number].eval()
    nn.init.zeros_(block.conv[7].weight)
    x = torch.randn(2, 12 if adds else 8, 4, 4)
    same(block(x), x if adds else torch.zeros(2, 12, 4, 4))


def test_mobilenet_of_full_width_has_the_papers_channels() -> None:
    net = MODELS["mobilenet_v2"](10, width_multiplier=1.0)
    widths = [net.conv1[0].out_channels, *(stage[-1].conv[6].out_channels for stage in net.blocks)]
    assert widths == [32, 16, 24, 32, 64, 96, 160, 320]
    assert net.classifier[0].in_features == 1280


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_a_shuffle_deals_the_channels_of_the_groups_out_in_turn(groups: int) -> None:
    x = torch.randn(2, 12, 3, 2)
    expected = torch.empty_like(x)
    for group in range(groups):
        for number in range(12 // groups):
            expected[:, number * groups + group] = x[:, group * (12 // groups) + number]
    same(channel_shuffle(x, groups), expected)


def test_a_group_unit_at_stride_2_sets_its_pooled_input_beside_its_branch() -> None:
    unit = MODELS["shufflenet_v1"](10).layer1[0].eval()
    nn.init.zeros_(unit.bn3.weight)
    pooled = torch.tensor([[4, 6], [6, 9]]) / 9  # ones, averaged with the zeros around them
    expected = torch.cat([torch.zeros(1, 216, 2, 2), pooled.expand(1, 24, 2, 2)], dim=1)
    torch.testing.assert_close(unit(torch.ones(1, 24, 4, 4)), expected)


def test_a_group_unit_at_stride_1_adds_its_input() -> None:
    unit = MODELS["shufflenet_v1"](10).layer1[1].eval()
    nn.init.zeros_(unit.bn3.weight)
    x = torch.rand(2, 240, 4, 4)
    same(unit(x), x)


def test_a_split_unit_keeps_one_half_of_its_channels_and_changes_the_other_alone() -> None:
    unit = MODELS["shufflenet_v2"](10).layer1[1].eval()
    first, second = torch.rand(2, 116, 4, 4), torch.rand(2, 116, 4, 4)
    out = unit(torch.cat([first[:, :58], second[:, 58:]], dim=1))
    same(out[:, 0::2], first[:, :58])
    same(out[:, 1::2], unit(second)[:, 1::2])
    assert bool((unit(first)[:, 1::2] != out[:, 1::2]).any())


# --- first weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "layer", "fan"),
    [
        ("resnet20", {}, "layer3.0.conv1", 9 * 32),  # fan-in
        ("resnet20", {"shortcut": "projection"}, "layer3.0.conv1", 9 * 64),  # fan-out from here
        ("resnet8x4", {}, "layer3.0.downsample.0", 256),
        ("wrn_16_2", {}, "block3.layer.0.conv1", 9 * 128),
        ("vgg8", {}, "block1.0", 9 * 128),
        ("mobilenet_v2", {}, "blocks.6.0.conv.0", 480),
        ("mobilenet_v2", {}, "blocks.6.0.conv.3", 9 * 480),
    ],
)
def test_a_convolution_starts_with_the_standard_deviation_of_its_source(
    name: str, params: dict[str, Any], layer: str, fan: int
) -> None:
    weight = MODELS[name](10, **params).get_submodule(layer).weight
    expected, error = (2 / fan) ** 0.5, weight.numel() ** -0.5  # relative, of an estimated mean
    assert weight.std().item() == pytest.approx(expected, rel=4 * error / 2**0.5)
    assert abs(weight.mean().item()) < 4 * error * expected


@pytest.mark.parametrize("name", ["vgg8", "mobilenet_v2"])
def test_a_classifier_starts_small_where_its_source_does(name: str) -> None:
    (linear,) = (module for module in MODELS[name](100).modules() if isinstance(module, nn.Linear))
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    same(linear.bias, torch.zeros(100))


# --- every model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 32, 32)])
def test_every_model_gives_one_row_of_logits_per_picture_whatever_its_neighbours(
    name: str, shape: tuple[int, ...]
) -> None:
    net, image = MODELS[name](5, in_channels=shape[1]).eval(), torch.randn(shape)
    with torch.no_grad():
        logits = net(image)
        assert logits.shape == (2, 5)
        assert bool(logits.isfinite().all())
        torch.testing.assert_close(net(image), logits, rtol=0, atol=0)
        torch.testing.assert_close(net(image.flip(0)).flip(0), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_every_model_receives_a_gradient(name: str) -> None:
    net, image = MODELS[name](5), torch.randn(4, 3, 16, 16)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net(image)
    # with the statistics of this batch, now constant: in training a bias before BatchNorm has none
    F.cross_entropy(net.eval()(image), torch.arange(4)).backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool((parameter.grad != 0).any()), parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_every_model_survives_its_state_dict(name: str) -> None:
    first, second = MODELS[name](5, in_channels=1).eval(), MODELS[name](5, in_channels=1).eval()
    second.load_state_dict(first.state_dict())
    image = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(second(image), first(image), rtol=0, atol=0)
