"""Branches and the layer they become: equal wherever that is exact, refused wherever it is not."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdcore.kdiffusion.branches import Scale, add_branches
from kdcore.kdiffusion.fuse import fold_projector, fuse
from kdcore.kdiffusion.kinds import KINDS, Kind
from kdcore.kdiffusion.parallel import Branches
from kdcore.models import MODELS

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # thousands of small networks

ALL_KINDS: tuple[Kind, ...] = tuple(KINDS)
DEEPER: tuple[Kind, ...] = ("same", "1x1", "1x1-kxk")  # whatever the width, stride and dilation
# groups and padding
WINDOWS = ((1, "zeros"), (8, "replicate"), (2, "reflect"), (1, "circular"))
PICTURE = torch.linspace(-2, 2, 2 * 8 * 7 * 9).reshape(2, 8, 7, 9).sin().double()


ROWS = torch.randn(20, 16, 4, generator=torch.Generator().manual_seed(5)).double()
TARGETS = torch.randn(20, 16, 6, generator=torch.Generator().manual_seed(6)).double()
IMAGE = torch.linspace(-2, 2, 4 * 3 * 16 * 16).reshape(4, 3, 16, 16).cos()


def network(conv: nn.Conv2d, norm: nn.Module | None = None) -> nn.Module:
    pieces = OrderedDict(conv=conv, **({} if norm is None else {"norm": norm}))
    return nn.Sequential(pieces).double()


def branched(
    conv: nn.Conv2d,
    kinds: tuple[Kind, ...],
    count: int | None = None,
    *,
    norm: bool = True,
    **options: Any,
) -> nn.Module:
    """Branches of a convolution and its norm, with statistics as after a hard training."""
    net = network(conv, nn.BatchNorm2d(conv.out_channels) if norm else None)
    image = PICTURE[:, : conv.in_channels]
    add_branches(net, ["conv"], count or len(kinds), kinds=kinds, image=image, **options)
    return after_training(net)


def after_training(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0, 2)[0] = 0
            module.weight.data.normal_(1, 1)
            module.bias.data.normal_(0, 0.3)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            module.bias.data.normal_()
    return net.eval()


def check_equal(value: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    peak = float(expected.abs().max())
    assert peak > 0
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance * peak)


def plain_state(net: nn.Module) -> dict[str, Tensor]:
    return {name: held.clone() for name, held in net.state_dict().items()}


@pytest.mark.parametrize("stride", [1, 2, (2, 1)], ids=str)
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same"], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, (5, 3), 2], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_fused_equals_the_branches_of_every_window(kernel: Any, padding: Any, stride: Any) -> None:
    if padding == "same" and stride != 1:
        return  # torch makes no such convolution
    kinds = ALL_KINDS if stride == 1 else (*DEEPER, "average")
    for groups, mode in WINDOWS:
        conv = nn.Conv2d(
            8, 8, kernel, stride, padding, groups=groups, padding_mode=mode, bias=mode == "reflect"
        )
        plain = network(copy.deepcopy(conv), nn.BatchNorm2d(8)).eval()
        net = branched(conv, kinds)
        with torch.no_grad():
            expected = net(PICTURE)
            assert expected.shape == plain(PICTURE).shape
            fused = fuse(net)
            check_equal(fused(PICTURE), expected)
            plain.load_state_dict(fused.state_dict())
            check_equal(plain(PICTURE), expected)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_fused_equals_the_branches_of_every_kind_alone(kind: Kind, groups: int) -> None:
    net = branched(nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False), (kind,), 3)
    with torch.no_grad():
        # border and interior apart: what is wrong with padding shows only at the border
        fused, expected = fuse(net)(PICTURE), net(PICTURE)
        check_equal(fused[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1])
        check_equal(fused, expected)


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("dilation", [2, (1, 3)], ids=str)
def test_fused_equals_the_branches_of_dilated_widening_and_narrowing_windows(
    width: int, dilation: Any
) -> None:
    conv = nn.Conv2d(8, width, 3, 2, padding=2, dilation=dilation, groups=2)
    net = branched(conv, DEEPER, 7)
    with torch.no_grad():
        check_equal(fuse(net)(PICTURE), net(PICTURE))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scale", ["gamma", "literal", "root"])
def test_fused_equals_the_branches_at_every_scale(scale: str, norm: bool) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=not norm)
    net = branched(conv, DEEPER, 4, norm=norm, scale=scale)
    with torch.no_grad():
        check_equal(fuse(net)(PICTURE), net(PICTURE))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_equals_the_branches_of_a_linear_layer(norm: bool, bias: bool) -> None:
    norms = [nn.BatchNorm1d(5)] if norm else []
    net = nn.Sequential(nn.Linear(4, 5, bias=bias), *norms).double()
    plain = copy.deepcopy(net).eval()
    rows = torch.randn(6, 4).double()
    after_training(add_branches(net, ["0"], 3, image=rows))
    with torch.no_grad():
        plain.load_state_dict(fuse(net).state_dict())
        check_equal(plain(rows), net(rows))
        if not norm:
            tokens = torch.randn(2, 7, 4).double()
            assert net[0].branches(tokens).shape == (2, 3, 7, 5)
            check_equal(plain(tokens), net(tokens))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize("count", [8, 16])
def test_fused_equals_the_branches_in_lower_precision(
    dtype: torch.dtype, tolerance: float, count: int
) -> None:
    for groups, kernel in ((1, 1), (8, 3), (1, 5)):
        conv = nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=groups, bias=False)
        net = branched(conv, ALL_KINDS, count).to(dtype)
        with torch.no_grad():
            fused = fuse(net)
            assert fused.conv.weight.dtype is dtype
            check_equal(fused(PICTURE.to(dtype)), net(PICTURE.to(dtype)), tolerance)


def test_sums_are_in_float64_and_rounded_once() -> None:
    net = branched(nn.Conv2d(8, 8, 1, bias=False), ("same",), 16).float()
    exact = fuse(copy.deepcopy(net).double()).conv.weight
    torch.testing.assert_close(fuse(net).conv.weight, exact.float(), rtol=0, atol=0)


def test_fusing_leaves_the_branches_and_their_mode_alone() -> None:
    net = branched(nn.Conv2d(8, 8, 3), ("same",), 2)
    before, expected = plain_state(net), net(PICTURE)
    fused = fuse(net)
    torch.nn.init.zeros_(fused.conv.weight)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(net(PICTURE), expected, rtol=0, atol=0)
    assert not any(module.training for module in fused.modules())


def test_fusing_twice_changes_nothing() -> None:
    once = fuse(branched(nn.Conv2d(8, 8, 3, padding=1), ALL_KINDS))
    twice = fuse(once)
    assert not any(isinstance(module, Branches) for module in once.modules())
    torch.testing.assert_close(dict(twice.state_dict()), plain_state(once), rtol=0, atol=0)
    torch.testing.assert_close(twice(PICTURE), once(PICTURE), rtol=0, atol=0)


def test_a_copy_fuses_like_its_original() -> None:
    net = branched(nn.Conv2d(8, 8, 3, padding=1), ALL_KINDS)
    copied = copy.deepcopy(net)
    after_training(copied)  # so that a reference to the original would show
    with torch.no_grad():
        check_equal(fuse(copied)(PICTURE), copied(PICTURE))
        check_equal(fuse(net)(PICTURE), net(PICTURE))


def test_a_layer_without_bias_and_norm_gains_a_bias_where_its_branches_are_normalised() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    without = branched(copy.deepcopy(conv), DEEPER, norm=False)
    assert fuse(without).conv.bias is None
    net = branched(conv, ALL_KINDS, norm=False, batch_norm=True)
    with torch.no_grad():
        assert fuse(net).conv.bias is not None
        check_equal(fuse(net)(PICTURE), net(PICTURE))


def spoil(net: nn.Module, kind: str, piece: int, module: nn.Module) -> None:
    net.conv.branches.kinds[kind][piece] = module.double()


REFUSED = {
    "an activation": ("same", 1, nn.ReLU(), "a ReLU is not known to be one linear map"),
    "another norm": ("1x1", 2, nn.GroupNorm(2, 8), "a GroupNorm is not known"),
    "dropout at work": ("same", 1, nn.Dropout(), "a Dropout is not known"),
    "no statistics": (
        "same",
        1,
        nn.BatchNorm2d(8, track_running_stats=False).eval(),
        "a BatchNorm2d without running statistics",
    ),
    "padding inside": (
        "1x1-kxk",
        2,
        nn.Conv2d(8, 8, 3, padding=1),
        "pads what is inside a branch",
    ),
    "an average without the padding": (
        "average",
        0,
        nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
        "its border is no average that a convolution makes",
    ),
    "a second window": ("same", 1, nn.Conv2d(8, 8, 3), "a convolution after a larger one"),
    "a subclass": ("same", 0, type("Odd", (nn.Conv2d,), {})(8, 8, 3), "an? Odd is not known"),
    "groups that mix": (
        "same",
        0,
        nn.Conv2d(8, 8, 3),
        "its 1 groups are no multiple of the layer's 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_one_linear_map_is_refused_by_name(case: str) -> None:
    kind, piece, module, message = REFUSED[case]
    net = branched(nn.Conv2d(8, 8, 3, padding=1, groups=2), ALL_KINDS)
    fuse(net)
    spoil(net, kind, piece, module)
    with pytest.raises(ValueError, match=message) as refusal:
        fuse(net)
    assert f"cannot fuse conv.branches.kinds.{kind}.{piece}: " in str(refusal.value)


def test_a_branch_of_another_stride_or_window_is_refused_by_name() -> None:
    for module, message in (
        (nn.Conv2d(8, 8, 3, 2), "its stride and dilation"),
        (nn.Conv2d(8, 8, 3, dilation=2), "its stride and dilation"),
        (nn.Conv2d(8, 8, 5), r"its \(5, 5\) taps from \(0, 0\) on do not fit into the layer's"),
    ):
        net = branched(nn.Conv2d(8, 8, 3, padding=1), ("same",))
        spoil(net, "same", 0, module)
        with pytest.raises(ValueError, match=f"cannot fuse conv.branches.kinds.same: {message}"):
            fuse(net)


def test_a_network_in_training_mode_is_refused_by_name() -> None:
    net = branched(nn.Conv2d(8, 8, 3), ("same",)).train()
    with pytest.raises(ValueError, match=r"kinds.same.1: a BatchNorm2d in training mode .* eval"):
        fuse(net)


def test_what_is_refused_would_have_been_wrong() -> None:
    """Zero padding between 1x1 with its norm and k x k: right inside, wrong at the border."""
    net = branched(nn.Conv2d(8, 8, 3, padding=1), ("1x1-kxk",))
    with torch.no_grad():
        first, norm, second, last = net.conv.branches.kinds["1x1-kxk"]
        between = nn.functional.pad(norm(first(PICTURE)), (1, 1, 1, 1))
        difference = (last(second(between)) - fuse(net)(PICTURE)).abs().amax((0, 1))
    assert float(difference[1:-1, 1:-1].max()) < 1e-10
    assert float(difference.max()) > 0.01


def test_a_norm_whose_place_is_gone_is_refused() -> None:
    net = branched(nn.Conv2d(8, 8, 3), ("same",))
    net.norm = nn.Sequential()
    with pytest.raises(ValueError, match="cannot fuse conv: what stood where its norm was is gone"):
        fuse(net)


@pytest.mark.parametrize("bias", [True, False])
def test_a_projector_before_the_classifier_folds_into_it(bias: bool) -> None:
    projector = nn.Conv2d(8, 12, 1, bias=bias).double()
    classifier = nn.Linear(12, 3, bias=bias).double()
    with torch.no_grad():
        expected = classifier(projector(PICTURE).mean((2, 3)))
        check_equal(fold_projector(projector, classifier)(PICTURE.mean((2, 3))), expected)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"kernel_size": 3}], ids=str
)
def test_a_projector_that_is_no_pointwise_map_is_refused(options: dict[str, int]) -> None:
    projector = nn.Conv2d(8, 12, **({"kernel_size": 1} | options))
    with pytest.raises(ValueError, match="expected a 1x1 convolution without"):
        fold_projector(projector, nn.Linear(12, 3))


def difference_of_training(scale: Scale, rate: float) -> float:
    """How far branches trained at 0.08 end from one layer trained at another rate."""
    torch.manual_seed(3)
    layer = nn.Linear(4, 6, bias=False).double()
    net = add_branches(nn.Sequential(layer), ["0"], 8, scale=scale, image=ROWS[0])
    alone = fuse(net)
    for model, lr in ((net, 0.08), (alone, rate)):
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        for rows, target in zip(ROWS, TARGETS, strict=True):
            optimizer.zero_grad()
            (model(rows) - target).square().mean().backward()
            optimizer.step()
    return float((fuse(net)[0].weight - alone[0].weight).detach().abs().max())


def test_branches_without_norm_trained_by_their_mean_are_one_layer_at_a_smaller_rate() -> None:
    assert difference_of_training("literal", 0.08 / 8) < 1e-12
    assert difference_of_training("root", 0.08) < 1e-12
    assert difference_of_training("literal", 0.08) > 1e-3


def test_the_fused_student_is_the_plain_one_with_other_weights() -> None:
    net = MODELS["resnet8"](5, width=4)
    add_branches(net, ["layer1", "layer3"], 4, kinds=("same", "1x1", "1x1-kxk", "average"))
    for _ in range(3):
        net(IMAGE)
    fused, plain = fuse(net.eval()), MODELS["resnet8"](5, width=4).eval()
    plain.load_state_dict(fused.state_dict())
    assert repr(fused) == repr(plain)
    with torch.no_grad():
        expected = net(IMAGE)
        for value in (fused(IMAGE), plain(IMAGE)):
            torch.testing.assert_close(
                value, expected, rtol=0, atol=5e-6 * float(expected.abs().max())
            )
