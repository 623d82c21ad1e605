"""Branches in networks that are not ours: found, trained through, fused to the plain network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdcore.kdiffusion.branches import add_branches, branch_taps
from kdcore.kdiffusion.fuse import fuse

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def timm(name: str) -> nn.Module:
    from timm import create_model

    return create_model(name, num_classes=3)


def torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=3)


# library, network, and the layers that its stages end in
CASES: dict[str, tuple[Callable[[str], nn.Module], dict[str, str]]] = {
    "shufflenet_v2_x0_5": (
        torchvision,
        {"stage4": "stage4.3.branch2.5", "conv5": "conv5.0"},
    ),
    # its shortcut averages before it convolves, and runs last
    "resnet10t": (timm, {"layer2": "layer2.0.conv2", "layer4": "layer4.0.conv2"}),
    # its norms hold the activations
    "mobilenetv2_035": (timm, {"blocks.5": "blocks.5.2.conv_pwl", "conv_head": "conv_head"}),
    # its maps are channels last, and its last layer is linear
    "convnext_atto": (timm, {"stages.1": "stages.1.blocks.1.mlp.fc2"}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], dict[str, str]]:
    make, stages = CASES[request.param]
    return lambda: make(request.param).double(), stages


def moved(net: nn.Module) -> nn.Module:
    """With statistics and weights as after some training."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return net.eval()


def test_the_fused_network_computes_the_same_and_loads_into_the_plain_one(
    case: tuple[Callable[[], nn.Module], dict[str, str]],
) -> None:
    make, stages = case
    net, plain = make(), make().eval()
    add_branches(net, stages, 3)
    assert branch_taps(net) == {stage: f"{layer}.branches" for stage, layer in stages.items()}
    fused, image = fuse(moved(net)), torch.randn(2, 3, 64, 64).double()
    assert repr(fused) == repr(plain)
    plain.load_state_dict(fused.state_dict())
    with torch.no_grad():
        expected = net(image)
        assert float(expected.std()) > 0
        for value in (fused(image), plain(image)):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
