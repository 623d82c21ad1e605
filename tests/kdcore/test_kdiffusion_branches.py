"""add_branches: where branches go, how they start, and what the rest of the network sees."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcore.kdiffusion.branches import Scale, add_branches, branch_taps
from kdcore.kdiffusion.kinds import KINDS
from kdcore.kdiffusion.parallel import Branches
from kdcore.kdiffusion.stages import last_layers
from kdcore.models import MODELS
from kdcore.taps import Tapped

STAGES = ["layer1", "layer3"]
IMAGE = torch.linspace(-2, 2, 4 * 3 * 16 * 16).reshape(4, 3, 16, 16).cos()


def student(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS["resnet8"](5, width=4)


class Shortcut(nn.Module):
    """A block whose shortcut has a convolution, registered and run after the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv2(self.conv1(x).relu()))
        return (out + self.shortcut(x)).relu_()


def test_the_last_layer_of_a_stage_and_its_norm_are_found() -> None:
    found = last_layers(student(), ["layer1", "layer2.0", "conv1", "linear"], IMAGE)
    assert found == [
        ("layer1", "layer1.0.conv2", "layer1.0.bn2"),
        ("layer2.0", "layer2.0.conv2", "layer2.0.bn2"),
        ("conv1", "conv1", "bn1"),
        ("linear", "linear", None),
    ]


def test_a_shortcut_is_not_the_last_layer_although_it_runs_last() -> None:
    net = nn.Sequential(Shortcut(), nn.BatchNorm2d(4))
    assert last_layers(net, ["0"], IMAGE) == [("0", "0.conv2", "0.norm")]


def test_a_norm_after_the_sum_is_not_that_of_the_layer() -> None:
    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x) + x)

    assert last_layers(Before(), ["conv"], IMAGE) == [("conv", "conv", None)]


def test_a_norm_is_not_taken_where_another_also_reads_the_layer() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.norm(x) + x

    assert last_layers(Both(), ["conv"], IMAGE) == [("conv", "conv", None)]


def test_the_search_leaves_modes_statistics_and_gradients_alone() -> None:
    net = student()
    net.layer1.eval()
    modes = [module.training for module in net.modules()]
    before = {name: held.clone() for name, held in net.state_dict().items()}
    last_layers(net, STAGES, IMAGE)
    assert [module.training for module in net.modules()] == modes
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("layer4", "unknown layer of _CifarResNet 'layer4'; did you mean"),
        ("bn1", "'bn1' has no convolution or linear layer on the way to its output"),
        ("", "unknown layer"),
    ],
)
def test_a_stage_without_a_layer_is_refused(stage: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_branches(student(), [stage], 2)


def test_a_layer_that_runs_twice_is_refused() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    with pytest.raises(ValueError, match="'0' runs 2 times a picture, expected once"):
        add_branches(nn.Sequential(conv, conv), ["0"], 2)


@pytest.mark.parametrize("count", [1, 3])
def test_every_branch_is_a_layer_and_norm_of_its_own(count: int) -> None:
    plain, net = student(), add_branches(student(), STAGES, count, scale="literal").eval()
    x = torch.randn(2, 16, 5, 5)
    branches = net.layer3[0].conv2
    conv, norm = branches.branches.kinds["same"]
    outputs = branches.branches(x)
    assert outputs.shape == (2, count, 16, 5, 5)
    for i in range(count):
        rows = slice(16 * i, 16 * (i + 1))
        alone = copy.deepcopy(plain.layer3[0].conv2)
        alone.weight.data.copy_(conv.weight[rows])
        torch.testing.assert_close(outputs[:, i], alone(x) * (1 + norm.eps) ** -0.5)
    torch.testing.assert_close(branches(x), outputs.mean(1))
    assert not isinstance(net.layer2[0].conv2, Branches)


def test_branches_of_several_kinds_and_groups_keep_their_channels() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
    net = add_branches(nn.Sequential(conv, nn.BatchNorm2d(8)), ["0"], 6, kinds=tuple(KINDS)).eval()
    counts = {kind: len(pieces[-1].weight) // 8 for kind, pieces in net[0].branches.kinds.items()}
    assert counts == {"same": 2, "1x1": 1, "1x1-kxk": 1, "average": 1, "identity": 1}
    x = torch.randn(2, 8, 5, 5)
    outputs = net[0].branches(x) * (1 + 1e-5) ** 0.5 / 6**0.5
    torch.testing.assert_close(outputs[:, 5], x)
    torch.testing.assert_close(outputs[:, 4], nn.functional.avg_pool2d(x, 3, 1, padding=1))
    pointwise = net[0].branches.kinds["1x1"][1].weight
    torch.testing.assert_close(outputs[:, 2], nn.functional.conv2d(x, pointwise, groups=4))
    # rows of a stacked kernel stand in the order (group, branch, channel)
    same = net[0].branches.kinds["same"][0].weight.reshape(4, 2, 2, 2, 3, 3)
    for i in range(2):
        kernel = same[:, i].reshape(8, 2, 3, 3)
        expected = nn.functional.conv2d(x, kernel, padding=1, groups=4)
        torch.testing.assert_close(outputs[:, i], expected)


def test_branches_of_a_layer_that_starts_at_zero_differ() -> None:
    conv = nn.Conv2d(4, 8, 3)
    nn.init.zeros_(conv.weight)
    weight = add_branches(nn.Sequential(conv), ["0"], 2)[0].branches.kinds["same"][0].weight
    assert bool((weight[:8] != weight[8:]).all())


@pytest.mark.parametrize("norm", [True, False])
def test_the_mean_of_branches_starts_as_large_as_one_layer_unless_literal(norm: bool) -> None:
    x, spread = torch.randn(64, 32, 4, 4), {}
    scales: tuple[Scale, ...] = ("gamma", "literal", "root")
    for scale in scales:
        torch.manual_seed(1)
        norms = [nn.BatchNorm2d(32)] if norm else []
        net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), *norms)
        with torch.no_grad():
            plain = net(x).std()
            spread[scale] = float(add_branches(net, ["0"], 16, scale=scale)(x).std() / plain)
    assert spread["gamma"] == pytest.approx(1, rel=0.1)
    assert spread["root"] == pytest.approx(spread["gamma"], rel=1e-5)
    assert spread["literal"] == pytest.approx(spread["gamma"] / 4, rel=1e-5)


def test_the_outputs_of_the_branches_are_a_tapped_layer() -> None:
    net = add_branches(student(), STAGES, 3)
    assert branch_taps(net) == {
        "layer1": "layer1.0.conv2.branches",
        "layer3": "layer3.0.conv2.branches",
    }
    tapped = Tapped(net, [*branch_taps(net).values(), "layer3.0.conv2", "layer3.0.bn2"]).eval()
    features = tapped(IMAGE).features
    stacked = features["layer3.0.conv2.branches"]
    assert stacked.shape == (4, 3, 16, 4, 4)
    for after in ("layer3.0.conv2", "layer3.0.bn2"):  # the norm's place is empty
        torch.testing.assert_close(features[after], stacked.mean(1))


def test_every_parameter_of_the_branches_is_trained() -> None:
    net = add_branches(student(), STAGES, 5, kinds=tuple(KINDS))
    net(IMAGE).square().sum().backward()
    names = {name for name, _ in net.named_parameters() if ".branches." in name}
    assert len(names) == 2 * (3 + 3 + 6 + 2 + 2)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_a_saved_network_with_branches_can_be_built_again() -> None:
    net = add_branches(student(), STAGES, 3, kinds=("same", "1x1"))
    net(IMAGE)  # moves the statistics
    again = add_branches(student(seed=1), STAGES, 3, kinds=("same", "1x1"))
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again.eval()(IMAGE), net.eval()(IMAGE), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "expected at least one branch of each of .*, got 0"),
        ({"count": 2, "kinds": ("same", "1x1", "identity")}, "at least one branch of each"),
        ({"layers": ["layer3", "layer3.0"]}, "'layer3.0.conv2' is the last layer of 2 of the"),
        ({"layers": ["layer3"], "kinds": ("same", "1x1-3x3")}, "unknown kind of branch '1x1-3x3'"),
        ({"layers": ["layer3.0.conv1"], "kinds": ("identity",)}, "as many channels in as out"),
        ({"layers": ["linear"], "kinds": ("1x1",)}, "'linear' cannot have branches: a linear"),
        ({"layers": ["linear"], "batch_norm": True}, "batch_norm is for convolutions"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_branches_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    net, expected = student(), dict(student().state_dict())
    with pytest.raises(ValueError, match=message):
        add_branches(net, **({"layers": ["layer1"], "count": 2} | options))
    torch.testing.assert_close(dict(net.state_dict()), expected, rtol=0, atol=0)  # all or none


def test_kinds_that_do_not_suit_a_window_are_refused() -> None:
    for conv, kind, message in (
        (nn.Conv2d(3, 3, 3, 2), "identity", "'identity' needs stride 1"),
        (nn.Conv2d(3, 3, 3, dilation=2), "average", "'average' needs dilation 1"),
        (nn.Conv2d(3, 3, 3), "average", "'average' learns by its BatchNorm only"),
    ):
        with pytest.raises(ValueError, match=f"'0' cannot have branches: .*{message}"):
            add_branches(nn.Sequential(conv), ["0"], 1, kinds=(kind,))


def test_a_norm_that_could_not_hold_the_bias_is_refused() -> None:
    for options in ({"affine": False}, {"track_running_stats": False}):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options))
        with pytest.raises(ValueError, match="'0' cannot have branches: its BatchNorm has no"):
            add_branches(net, ["0"], 2)


def test_what_a_norm_does_besides_stays_and_must_be_its_childrens_work() -> None:
    class Activated(nn.BatchNorm2d):
        def __init__(self, factor: float) -> None:
            super().__init__(4)
            self.act, self.factor = nn.ReLU(), factor

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * self.act(super().forward(x))

    net = add_branches(nn.Sequential(nn.Conv2d(3, 4, 3), Activated(1.0)), ["0"], 2)
    outputs, norm = net.eval()[0](IMAGE), net[0].branches.kinds["same"][1]
    assert type(norm) is nn.BatchNorm2d
    torch.testing.assert_close(net(IMAGE), outputs.relu())
    with pytest.raises(ValueError, match="its Activated does not only normalise and then call"):
        add_branches(nn.Sequential(nn.Conv2d(3, 4, 3), Activated(2.0)), ["0"], 2)


def test_a_convolution_of_another_class_is_refused() -> None:
    class Standardised(nn.Conv2d):
        pass

    with pytest.raises(ValueError, match=r"expected nn\.Conv2d or nn\.Linear itself, got Standard"):
        add_branches(nn.Sequential(Standardised(3, 4, 3)), ["0"], 2)


def test_a_layer_with_branches_gets_no_more() -> None:
    net = add_branches(student(), ["layer1"], 2)
    with pytest.raises(ValueError, match="is in a branch already"):
        add_branches(net, ["layer1"], 2)


def test_a_network_without_convolutions_needs_an_image() -> None:
    with pytest.raises(ValueError, match="no convolution that tells what a picture is; pass image"):
        add_branches(nn.Sequential(nn.Linear(3, 4)), ["0"], 2)
