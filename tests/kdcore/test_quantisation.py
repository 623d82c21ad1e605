"""Layers of few bits: their grids beside torch's own, and that bytes compute what was trained."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore.models import convnet
from kdcore.quantisation import (
    MOMENTUM,
    IntegerConv2d,
    IntegerLinear,
    RoundedInput,
    RoundedLinear,
    rounded,
    steps_of,
    weight_scale,
    with_integers,
)
from kdcore.taps import Tapped


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def trained(bits: int) -> nn.Module:
    """A rounded network whose ranges and statistics have followed a few batches."""
    net = rounded(convnet(4, 1, width=4), bits).train()
    for _ in range(5):
        net(torch.randn(16, 1, 8, 8) - 0.5)
    return net.eval()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_on_the_grid_of_torch(bits: int) -> None:
    weight = torch.randn(5, 3, 3, 3)
    scale, limit = weight_scale(weight, bits), 2 ** (bits - 1) - 1
    zero = torch.zeros(5, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -limit, limit)
    torch.testing.assert_close(steps_of(weight, scale) * scale[:, None, None, None], expected)
    exactly(steps_of(weight, scale).abs().amax(dim=(1, 2, 3)), torch.full((5,), limit * 1.0))


def test_a_channel_of_zeros_stays_zero() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    net = rounded(layer, 8)
    exactly(net(torch.randn(4, 3)), layer.bias.expand(4, 2))


@pytest.mark.parametrize("bits", [2, 8])
def test_inputs_are_on_the_grid_of_torch_and_zero_is_zero(bits: int) -> None:
    value = 3 * torch.rand(64) - 1
    rounding = RoundedInput(bits)
    rounding(value)
    least, greatest = float(value.min()), float(value.max())
    scale = (greatest - least) / (2**bits - 1)
    zero = round(-least / scale)
    beyond = torch.cat([value, torch.tensor([0.0, 9.0, -9.0])])
    expected = torch.fake_quantize_per_tensor_affine(beyond, scale, zero, 0, 2**bits - 1)
    torch.testing.assert_close(rounding.eval()(beyond), expected)
    assert float(rounding(torch.zeros(1))) == 0.0


def test_the_range_follows_the_batches_in_training_only() -> None:
    rounding = RoundedInput(8)
    rounding(torch.tensor([-1.0, 2.0]))
    assert (float(rounding.least), float(rounding.greatest)) == (-1.0, 2.0)
    rounding(torch.tensor([1.0, 4.0]))
    assert float(rounding.least) == pytest.approx(-1 + MOMENTUM)
    assert float(rounding.greatest) == pytest.approx(2 + 2 * MOMENTUM)
    before = rounding.greatest.clone()
    rounding.eval()(torch.tensor([100.0]))
    exactly(rounding.greatest, before)


def test_the_ends_of_the_range_have_a_gradient() -> None:
    value = torch.tensor([-1.0, 0.3, 2.0], requires_grad=True)
    RoundedInput(8)(value).sum().backward()
    assert value.grad is not None
    torch.testing.assert_close(value.grad, torch.ones(3))


def test_the_gradient_is_that_of_the_layer_without_rounding_but_beyond_the_range() -> None:
    layer = nn.Linear(3, 2)
    net = rounded(layer, 8)
    assert isinstance(net, RoundedLinear)
    net(torch.tensor([[-1.0, 0.5, 1.0]]))
    value = torch.tensor([[-9.0, 0.5, 9.0]], requires_grad=True)
    net.eval()(value).sum().backward()
    weights = net.weight.detach()
    assert value.grad is not None
    exactly(value.grad[0, [0, 2]], torch.zeros(2))
    torch.testing.assert_close(value.grad[0, 1], weights[:, 1].sum(), atol=0.02, rtol=0)
    assert net.weight.grad is not None
    torch.testing.assert_close(
        net.weight.grad, net.rounding(value).detach().expand(2, 3), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_compute_what_was_trained(bits: int) -> None:
    net, image = trained(bits), torch.randn(32, 1, 8, 8) - 0.5
    used = with_integers(net)
    torch.testing.assert_close(used(image), net(image), rtol=1e-5, atol=1e-5)
    held = [one for one in used.modules() if isinstance(one, IntegerConv2d | IntegerLinear)]
    assert len(held) == 4
    assert all(one.integers.dtype is torch.int8 for one in held)
    assert not any("weight" in dict(one.named_parameters(recurse=False)) for one in held)
    exactly(pickle.loads(pickle.dumps(used))(image), used(image))
    exactly(copy.deepcopy(used)(image), used(image))


def test_a_fold_of_batch_norm_moves_no_weight_off_its_grid() -> None:
    weight, factor = torch.randn(5, 3, 3, 3), torch.rand(5) + 0.5
    folded = weight * factor[:, None, None, None]
    exactly(steps_of(folded, weight_scale(folded, 8)), steps_of(weight, weight_scale(weight, 8)))


def test_more_bits_are_closer_to_the_network_without_rounding() -> None:
    image = torch.randn(64, 1, 8, 8)
    plain = convnet(4, 1, width=4).train()
    with torch.no_grad():
        expected = plain(image)
        rough = [rounded(plain, bits)(image) - expected for bits in (2, 4, 8)]
    off = [float(difference.abs().mean()) for difference in rough]
    assert off[0] > 3 * off[1] > 9 * off[2] > 0


def test_layers_keep_their_names_and_taps() -> None:
    plain = convnet(4, 1, width=4)
    net = trained(8)
    assert set(plain.state_dict()) < set(net.state_dict())
    outputs = Tapped(with_integers(net), ["block2.0"])(torch.randn(2, 1, 8, 8))
    assert outputs.features["block2.0"].shape[1] == 8
    embedding = outputs.features["embedding"]
    assert outputs.classifier is not None
    # the classifier's input is rounded once more
    logits = F.linear(embedding, *outputs.classifier)
    torch.testing.assert_close(outputs.logits, logits, atol=0.1, rtol=0)


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 to 8 bits, got 9"):
        rounded(nn.Linear(2, 2), 9)
    with pytest.raises(ValueError, match="ReLU has no convolution or linear layer to round"):
        rounded(nn.ReLU(), 8)
