"""Students that compute with few bits: rounded while they are trained, whole numbers afterwards."""

from __future__ import annotations

import copy
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.rows import gather_rows

MOMENTUM = 0.1  # of the range of a layer's inputs, as BatchNorm has for its statistics


class _Steps(torch.autograd.Function):
    """The nearest whole number within bounds; the gradient is 1 up to the bounds, 0 beyond."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
        steps = value.round()
        # with the bounds themselves, where torch's clamp has the gradient 0
        ctx.save_for_backward((least <= steps) & (steps <= greatest))
        return steps.clamp(least, greatest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


def weight_scale(weight: Float[Tensor, "k ..."], bits: int) -> Float[Tensor, " k"]:
    r"""Of each output channel what one step is worth: its greatest weight takes the last step.

    .. math:: s_k = \max |w_k| / (2^{b-1} - 1)

    Source: Jacob and others 2018, arXiv:1712.05877, section 3, with a scale for every channel as
    Krishnamoorthi 2018, arXiv:1806.08342, section 3.1.
    """
    greatest = weight.detach().flatten(1).abs().amax(dim=1)
    scale: Tensor = (greatest / (2 ** (bits - 1) - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
    return scale


def steps_of(weight: Float[Tensor, "k ..."], scale: Float[Tensor, " k"]) -> Float[Tensor, "k ..."]:
    """Weights in steps of their channel: whole numbers, with the gradient as if they were not."""
    scaled = weight / _by_channel(scale, weight)
    infinity = torch.full_like(scale[0], torch.inf)
    steps: Tensor = _Steps.apply(scaled, -infinity, infinity)  # the scale lets none be cut off
    return steps


@final
class RoundedInput(nn.Module):
    r"""A layer's input on a grid of :math:`2^b` values from its least to its greatest.

    .. math:: s \, \big(\operatorname{clamp}(\lfloor x / s \rceil + z, 0, 2^b - 1) - z\big)

    Zero is on the grid, so that padding is exact. In training the range follows that of the
    batches; the first batch sets it. Values beyond it are cut off and have no gradient.

    Source: Jacob and others 2018, arXiv:1712.05877, equation 12 and section 3.1.
    """

    least: Tensor
    greatest: Tensor
    batches: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels = 2**bits - 1
        for name in ("least", "greatest", "batches"):
            self.register_buffer(name, torch.tensor(0.0))

    def forward(self, value: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        if self.training:
            self._follow(value.detach())
        scale = ((self.greatest - self.least) / self.levels).clamp(min=1e-12)
        zero = (-self.least / scale).round()
        steps: Tensor = _Steps.apply(value / scale, -zero, self.levels - zero)
        on_grid: Tensor = scale * steps
        return on_grid

    @torch.no_grad()
    def _follow(self, value: Tensor) -> None:
        ends = gather_rows(torch.stack([value.amin(), value.amax()])[None].to(self.least))
        share = torch.where(self.batches > 0, MOMENTUM, 1.0)
        self.least.lerp_(ends[:, 0].amin().clamp(max=0), share)  # the grid must hold zero
        self.greatest.lerp_(ends[:, 1].amax().clamp(min=0), share)
        self.batches += 1


@final
class RoundedConv2d(nn.Conv2d):
    """A convolution with its input and weights on grids, for training.

    The BatchNorm behind it may be folded into its weights afterwards and changes nothing: a factor
    for each output channel is one of its scale.
    """

    def __init__(self, layer: nn.Conv2d, bits: int) -> None:
        super().__init__(**_shape_of_convolution(layer))
        self.weight, self.bias, self.bits = layer.weight, layer.bias, bits
        self.rounding = RoundedInput(bits)

    def forward(self, value: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
        weight = _rounded(self.weight, self.bits)
        made: Tensor = self._conv_forward(self.rounding(value), weight, self.bias)
        return made


@final
class RoundedLinear(nn.Linear):
    """A linear layer with its input and weights on grids, for training."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.weight, self.bias, self.bits = layer.weight, layer.bias, bits
        self.rounding = RoundedInput(bits)

    def forward(self, value: Float[Tensor, "... c"]) -> Float[Tensor, "... k"]:
        return F.linear(self.rounding(value), _rounded(self.weight, self.bits), self.bias)


@final
class IntegerConv2d(nn.Conv2d):
    """The same convolution with the steps of its weights as bytes, for use."""

    rounding: RoundedInput

    def __init__(self, layer: RoundedConv2d) -> None:
        super().__init__(**_shape_of_convolution(layer))
        _keep_integers(self, layer)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return _in_steps(self)

    def forward(self, value: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
        made: Tensor = self._conv_forward(self.rounding(value), self.weight, self.bias)
        return made


@final
class IntegerLinear(nn.Linear):
    """The same linear layer with the steps of its weights as bytes, for use."""

    rounding: RoundedInput

    def __init__(self, layer: RoundedLinear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        _keep_integers(self, layer)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return _in_steps(self)

    def forward(self, value: Float[Tensor, "... c"]) -> Float[Tensor, "... k"]:
        return F.linear(self.rounding(value), self.weight, self.bias)


def rounded(net: nn.Module, bits: int) -> nn.Module:
    """A copy for training whose convolutions and linear layers compute with so few bits.

    Layers and weights keep their names. BatchNorm, sums and pooling stay as they are.

    Raises ValueError for bits that no byte holds, and for a network without such layers.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"expected 2 to 8 bits, got {bits}")
    made = copy.deepcopy(net)
    paths = [path for path, module in made.named_modules() if type(module) in _ROUNDED]
    if not paths:
        raise ValueError(f"{type(net).__name__} has no convolution or linear layer to round")
    for path in paths:
        layer = made.get_submodule(path)
        made = _replaced(made, path, _ROUNDED[type(layer)](layer, bits))
    return made


def with_integers(net: nn.Module) -> nn.Module:
    """The network with every rounded layer as it is used: it computes the very same in evaluation.

    The weights are bytes. What is multiplied are whole numbers too, held as floating point, whose
    sums are exact below 2^24; programs for integers find them in the exported form.
    """
    made = copy.deepcopy(net)
    for path, layer in list(made.named_modules()):
        if type(layer) in _INTEGER:
            made = _replaced(made, path, _INTEGER[type(layer)](layer))
    return made


_ROUNDED: dict[type, Any] = {nn.Conv2d: RoundedConv2d, nn.Linear: RoundedLinear}
_INTEGER: dict[type, Any] = {RoundedConv2d: IntegerConv2d, RoundedLinear: IntegerLinear}


def _replaced(net: nn.Module, path: str, layer: nn.Module) -> nn.Module:
    if not path:
        return layer
    net.set_submodule(path, layer)
    return net


def _rounded(weight: Tensor, bits: int) -> Tensor:
    scale = weight_scale(weight, bits)
    return steps_of(weight, scale) * _by_channel(scale, weight)


def _keep_integers(
    made: IntegerConv2d | IntegerLinear, layer: RoundedConv2d | RoundedLinear
) -> None:
    del made.weight
    scale = weight_scale(layer.weight, layer.bits)
    steps = steps_of(layer.weight, scale).detach()
    made.register_buffer("integers", steps.to(torch.int8))
    made.register_buffer("scale", scale)
    made.bias = layer.bias
    made.rounding = layer.rounding


def _in_steps(layer: nn.Module) -> Tensor:
    integers, scale = layer.get_buffer("integers"), layer.get_buffer("scale")
    return integers * _by_channel(scale, integers)


def _by_channel(scale: Tensor, like: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (like.ndim - 1))


def _shape_of_convolution(layer: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    shape = {name: getattr(layer, name) for name in (*names, "groups", "padding_mode")}
    return shape | {"bias": layer.bias is not None}
