"""Branches back into the one layer that they amount to, exactly or not at all."""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdcore.kdiffusion.branches import replace_module
from kdcore.kdiffusion.kernels import LinearMap, linear_map
from kdcore.kdiffusion.kinds import Layer
from kdcore.kdiffusion.parallel import Branches


@torch.no_grad()
def fuse(net: nn.Module) -> nn.Module:
    r"""A copy of the network in which every layer that was given branches is one layer again.

    .. math:: W = c \sum_i g_i W_i, \quad b = c \sum_i (g_i b_i + \beta_i - g_i \mu_i), \quad
        g_i = \gamma_i / \sqrt{\mathrm{var}_i + \epsilon}

    The copy has the modules of the plain network, so that its state dict loads there: a BatchNorm
    that followed the layer is left with mean 0, variance 1 and the bias. Only a layer without bias
    and without norm gains a bias, if its branches had BatchNorms of their own. Sums are in float64
    and rounded once. In evaluation mode the copy computes what the network does, up to rounding; on
    a GPU compare with TF32 off. A network without branches is copied as it is.

    Raises ValueError, naming the module, for whatever is not one linear map: a BatchNorm in
    training mode or without running statistics, an activation or any other layer inside a branch,
    padding inside a branch, strides that differ.

    Source: Ding et al. 2021 (DBB), arXiv:2103.13425, section 3.1, where the map between two
    convolutions is padded as here, and Yao and others 2024, AAAI 38(15).
    """
    fused = copy.deepcopy(net)
    paths = {module: path for path, module in fused.named_modules()}
    for branches, path in paths.items():
        if not isinstance(branches, Branches):
            continue
        aside = branches.aside
        if aside.norm is not None and aside.place not in paths:
            raise ValueError(f"cannot fuse {path}: what stood where its norm was is gone")
        trained = next(branches.parameters())
        aside.layer.to(trained.device, trained.dtype)  # it has not followed the network
        _fill(branches, *_combined(branches, path))
        replace_module(fused, path, aside.layer)
        if aside.norm is not None:
            replace_module(fused, paths[aside.place], aside.norm)
    return fused


def fold_projector(projector: nn.Conv2d, classifier: nn.Linear) -> nn.Linear:
    r"""One classifier for a 1x1 convolution, the mean over positions and a classifier.

    .. math:: W' = W P, \quad b' = W b_P + b

    Exact only where nothing else stands between the two, no activation in particular. ``fuse``
    never does this, because the result is another network than the plain one. It saves work where
    C_in K < C_in C_mid + C_mid K.

    Raises ValueError for a convolution that is not 1x1 with stride 1, no groups and no padding.
    """
    if (projector.kernel_size, projector.stride, projector.groups) != ((1, 1), (1, 1), 1):
        raise ValueError(f"expected a 1x1 convolution without stride or groups, got {projector}")
    if projector.padding not in ((0, 0), "valid"):
        raise ValueError(f"expected a 1x1 convolution without padding, got {projector}")
    weight = classifier.weight.double()
    bias = weight.new_zeros(len(weight)) if classifier.bias is None else classifier.bias.double()
    if projector.bias is not None:
        bias = bias + weight @ projector.bias.double()
    folded = nn.Linear(projector.in_channels, classifier.out_features).to(classifier.weight)
    folded.weight.copy_(weight @ projector.weight[:, :, 0, 0].double())
    folded.bias.copy_(bias)
    return folded


def _combined(branches: Branches, path: str) -> tuple[Tensor, Tensor]:
    """Kernel and bias of the combination, in float64."""
    layer = branches.aside.layer
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    kernel = torch.zeros_like(layer.weight, dtype=torch.float64)
    bias = kernel.new_zeros(len(kernel))
    for kind, pieces in branches.branches.kinds.items():
        here = f"{path}.branches.kinds.{kind}"
        part = linear_map(cast(nn.Sequential, pieces), layer, here)
        placed = _placed(part, layer, here)
        # rows stand in the order (group, branch, channel): the sum is over branches
        summed = placed.reshape(groups, -1, len(kernel) // groups, *placed.shape[1:]).sum(1)
        kernel += summed.reshape(kernel.shape)
        bias += part.bias.reshape(groups, -1, len(kernel) // groups).sum(1).flatten()
    return kernel * branches.coefficient, bias * branches.coefficient


def _placed(part: LinearMap, layer: Layer, path: str) -> Tensor:
    """The kernel among the taps of the layer's own."""
    if isinstance(layer, nn.Linear):
        return part.kernel
    sizes = part.kernel.shape[2:]
    if part.stride != layer.stride or (sizes != (1, 1) and part.dilation != layer.dilation):
        raise ValueError(
            f"cannot fuse {path}: its stride and dilation {part.stride}, {part.dilation} differ "
            f"from those of the layer, {layer.stride}, {layer.dilation}"
        )
    top, left = (at // step for at, step in zip(part.offset, layer.dilation, strict=True))
    bottom, right = layer.kernel_size[0] - sizes[0] - top, layer.kernel_size[1] - sizes[1] - left
    if bottom < 0 or right < 0:
        raise ValueError(
            f"cannot fuse {path}: its {tuple(sizes)} taps from {(top, left)} on do not fit into "
            f"the layer's {layer.kernel_size}"
        )
    return F.pad(part.kernel, (left, right, top, bottom))


def _fill(branches: Branches, kernel: Tensor, bias: Tensor) -> None:
    """Write kernel and bias into what was put aside."""
    layer, norm = branches.aside.layer, branches.aside.norm
    layer.weight.copy_(kernel)
    if norm is not None and norm.running_mean is not None and norm.running_var is not None:
        norm.to(layer.weight.device, layer.weight.dtype)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)  # so that its root with eps is 1
        norm.weight.fill_(1)
        norm.bias.copy_(bias)
        bias = torch.zeros_like(bias)
    if layer.bias is not None:
        layer.bias.copy_(bias)
    elif norm is None and any(isinstance(piece, _BatchNorm) for piece in branches.modules()):
        layer.bias = nn.Parameter(bias.to(layer.weight))
