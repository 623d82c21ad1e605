"""The one kernel that a sequence of linear modules amounts to, in float64, or a refusal.

Kernels are on the padded input of the layer. Their rows are in the order (group, branch, channel),
and each reads the input channels of its own group.

Source: Ding et al. 2021 (DBB), arXiv:2103.13425, section 3.1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdcore.kdiffusion.kinds import PLAIN_NORMS, Copies, Crop, Layer

_SILENT = (nn.Dropout, nn.Dropout2d)  # in evaluation mode


class LinearMap(NamedTuple):
    """A convolution of the padded input, whose first tap stands at an offset."""

    kernel: Float[Tensor, "rows i h w"]
    bias: Float[Tensor, " rows"]
    groups: int
    stride: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    offset: tuple[int, ...] = (0, 0)  # in pixels
    is_input: bool = False


def linear_map(pieces: nn.Sequential, layer: Layer, path: str) -> LinearMap:
    """What the modules amount to, one after the other, on the padded input of ``layer``.

    Raises ValueError, naming the module by its path, for one that is not linear, that does not
    fuse exactly, or that is not known.
    """
    so_far = _input_of(layer)
    for name, module in pieces.named_children():
        try:
            so_far = _then(so_far, module)
        except ValueError as error:
            raise ValueError(f"cannot fuse {path}.{name}: {error}") from None
    return so_far


def _input_of(layer: Layer) -> LinearMap:
    """Row i reads channel i."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    one = torch.eye(layer.weight.shape[1], dtype=torch.float64, device=layer.weight.device)
    kernel = one.repeat(groups, 1)[:, :, None, None]
    return LinearMap(kernel, kernel.new_zeros(len(kernel)), groups, is_input=True)


def _then(before: LinearMap, module: nn.Module) -> LinearMap:
    kind = type(module)  # exactly: a subclass may do something else
    if isinstance(module, Crop) and before.is_input:
        return before._replace(offset=tuple(module.before))
    if isinstance(module, Copies):
        rows = torch.arange(len(before.bias), dtype=torch.float64)[None, :, None, None]
        rows = module(rows).flatten().long().to(before.bias.device)
        return before._replace(kernel=before.kernel[rows], bias=before.bias[rows], is_input=False)
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        return _then_convolution(before, module)
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        return _composed(before, module.weight[:, :, None, None], module.bias, groups=1)
    if isinstance(module, nn.AvgPool2d) and kind is nn.AvgPool2d:
        return _then_average(before, module)
    if isinstance(module, _BatchNorm) and kind in PLAIN_NORMS:
        return _then_norm(before, module)
    if kind is nn.Identity or (kind in _SILENT and not module.training):
        return before
    raise ValueError(f"a {kind.__name__} is not known to be one linear map of every picture")


def _then_convolution(before: LinearMap, conv: nn.Conv2d) -> LinearMap:
    if conv.padding not in ((0, 0), "valid"):
        raise ValueError(
            "it pads what is inside a branch, where the fused layer has the padded input passed "
            "through the modules before; pad before the branch"
        )
    if before.kernel.shape[2:] != (1, 1) or tuple(before.stride) != (1, 1):
        raise ValueError("a convolution after a larger one, or after a stride, is not supported")
    after = _composed(before, conv.weight, conv.bias, groups=conv.groups)
    return after._replace(stride=conv.stride, dilation=conv.dilation)


def _composed(before: LinearMap, weight: Tensor, bias: Tensor | None, *, groups: int) -> LinearMap:
    """A k x k kernel after a 1x1 one, group by group: W = W2 W1, b = (sum of the taps of W2) b1."""
    if groups % before.groups:
        raise ValueError(f"its {groups} groups are no multiple of the layer's {before.groups}")
    second, added = weight.double(), 0.0 if bias is None else bias.double()
    if before.is_input and groups == before.groups:  # for speed: the first kernel is the identity
        return before._replace(
            kernel=second, bias=second.new_zeros(len(second)) + added, is_input=False
        )
    second = second.reshape(groups, -1, *second.shape[1:])
    first = before.kernel[:, :, 0, 0].reshape(groups, -1, before.kernel.shape[1])
    kernel = torch.einsum("gomhw,gmi->goihw", second, first).flatten(0, 1)
    carried = torch.einsum("gomhw,gm->go", second, before.bias.reshape(groups, -1)).flatten()
    return before._replace(kernel=kernel, bias=carried + added, is_input=False)


def _then_average(before: LinearMap, pool: nn.AvgPool2d) -> LinearMap:
    """As a convolution of every channel by itself."""
    if pool.padding not in (0, (0, 0)) or pool.ceil_mode or pool.divisor_override is not None:
        raise ValueError(
            "it pads, rounds up or divides by another number, so that its border is no average "
            "that a convolution makes; pad before the branch"
        )
    if before.kernel.shape[2:] != (1, 1) or tuple(before.stride) != (1, 1):
        raise ValueError("an average after a larger window, or after a stride, is not supported")
    size, stride = _pair(pool.kernel_size), _pair(pool.stride)
    kernel = before.kernel.expand(-1, -1, *size) / math.prod(size)
    return before._replace(kernel=kernel, stride=stride, is_input=False)


def _then_norm(before: LinearMap, norm: _BatchNorm) -> LinearMap:
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"a {type(norm).__name__} without running statistics uses those of its batch"
        )
    if norm.training:
        raise ValueError(
            f"a {type(norm).__name__} in training mode uses the statistics of its batch; call "
            "eval() on the network before it is fused"
        )
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale + (norm.bias.double() if norm.affine else 0.0)
    kernel = before.kernel * scale[:, None, None, None]
    return before._replace(kernel=kernel, bias=before.bias * scale + shift, is_input=False)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
