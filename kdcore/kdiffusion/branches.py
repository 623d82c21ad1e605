"""Parallel branches in the place of a layer: apart in training, one layer afterwards (``fuse``)."""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdcore.kdiffusion.kinds import PLAIN_NORMS, Kind, Layer, Normalise, made
from kdcore.kdiffusion.parallel import Aside, Branches, Parallel
from kdcore.kdiffusion.stages import LastLayer, last_layers

Scale = Literal["gamma", "literal", "root"]


def add_branches(
    net: nn.Module,
    layers: Iterable[str],
    count: int,
    *,
    kinds: Sequence[Kind] = ("same",),
    scale: Scale = "gamma",
    batch_norm: bool = False,
    image: Tensor | None = None,
) -> nn.Module:
    r"""Give the last convolution or linear layer of each stage ``count`` parallel branches.

    .. math:: f(h) = \frac1m \sum_i f_i(h), \quad f_i = \mathrm{BN}_i(W_i * h)

    The network is changed in place and returned. Each branch has its own weights, drawn afresh,
    and its own BatchNorm if one follows the layer, or, with ``batch_norm``, in any case: fused,
    the layer then has a bias that the plain one may lack. What else that norm does, such as an
    activation, stays after the mean. ``layers`` are paths of stages, or of the layers themselves
    (``stages.last_layers``). The branches' outputs are the layer ``"<path>.branches"``, of shape
    (B, branches, ...); ``branch_taps`` says which.

    ``kinds`` are dealt to the branches in turn. ``scale`` corrects that a mean of independent
    branches is :math:`\sqrt m` times smaller than one: the branches are as much larger at first, by
    their BatchNorms' weights or where they have none by their own ("gamma"); or they are not
    ("literal"); or their sum is divided by :math:`\sqrt m` ("root").

    ``image`` is a small batch to find the layers with, by default a blank one of 64 x 64 pixels.

    Raises ValueError, naming the layer, where this cannot be done or could not be undone exactly.

    Source: Yao and others 2024, AAAI 38(15), equation 10. The correction of scale is ours: eight
    branches cost a toy student 15 points without. Branches without BatchNorm that are trained by
    their mean only are exactly one layer, at a learning rate m times smaller ("literal") or at the
    same ("root").
    """
    if not 1 <= len(kinds) <= count:
        raise ValueError(f"expected at least one branch of each of {list(kinds)}, got {count}")
    found = last_layers(net, layers, _blank(net) if image is None else image)
    _check_distinct(net, found)
    dealt = Counter(kinds[i % len(kinds)] for i in range(count))
    made_for = [_branches(net, last, dealt, scale=scale, batch_norm=batch_norm) for last in found]
    for last, branches in zip(found, made_for, strict=True):  # all or none
        replace_module(net, last.layer, branches)
        if last.norm is not None:
            replace_module(net, last.norm, branches.aside.place)
    return net


def branch_taps(net: nn.Module) -> dict[str, str]:
    """From each stage that was given branches to the layer name of their outputs."""
    return {
        module.aside.stage: f"{path}.branches"
        for path, module in net.named_modules()
        if isinstance(module, Branches)
    }


def replace_module(net: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module where the path leads, in the mode of the one that was there."""
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, module.train(net.get_submodule(path).training))


def _branches(
    net: nn.Module, last: LastLayer, dealt: Counter[Kind], *, scale: Scale, batch_norm: bool
) -> Branches:
    layer, norm = net.get_submodule(last.layer), None
    try:
        if not (isinstance(layer, Layer) and type(layer) in (nn.Conv2d, nn.Linear)):
            raise ValueError(f"expected nn.Conv2d or nn.Linear itself, got {type(layer).__name__}")
        if last.norm is not None:
            norm = _checked(net.get_submodule(last.norm))
        normalise, count = _normalise(layer, norm, batch_norm=batch_norm), dealt.total()
        kinds: dict[str, nn.Sequential] = {
            kind: made(kind, layer, number, normalise) for kind, number in dealt.items()
        }
        place = nn.Identity() if norm is None else _rest_of(norm)
    except ValueError as error:
        raise ValueError(f"{last.layer!r} cannot have branches: {error}") from None
    if scale == "gamma":
        for branches in kinds.values():
            cast(_BatchNorm | Layer, branches[-1]).weight.data *= math.sqrt(count)
    coefficient = 1 / math.sqrt(count) if scale == "root" else 1 / count
    aside = Aside(last.stage, layer, norm, place)
    return Branches(Parallel(layer, nn.ModuleDict(kinds)), coefficient, aside)


def _normalise(layer: Layer, norm: _BatchNorm | None, *, batch_norm: bool) -> Normalise:
    """What makes the BatchNorms of branches: like the layer's own, or torch's default, or none."""
    if norm is not None:
        kind = type(norm) if type(norm) in PLAIN_NORMS else nn.BatchNorm2d
        return lambda width: [kind(width, norm.eps, norm.momentum)]
    if not batch_norm:
        return lambda width: []
    if isinstance(layer, nn.Linear):
        raise ValueError("batch_norm is for convolutions; leave it out")
    return lambda width: [nn.BatchNorm2d(width)]


def _checked(norm: nn.Module) -> _BatchNorm:
    if not isinstance(norm, _BatchNorm) or not norm.affine or norm.running_mean is None:
        raise ValueError("its BatchNorm has no weight or no running statistics to fuse into")
    return norm


def _rest_of(norm: _BatchNorm) -> nn.Module:
    """What a norm does after normalising: nothing, or what its children do, as in timm's norms."""
    if type(norm) in PLAIN_NORMS:
        return nn.Identity()
    rest = nn.Sequential(OrderedDict(norm.named_children()))
    alone, after = copy.deepcopy((norm, rest))
    probe = torch.linspace(-3, 3, 8 * norm.num_features).reshape(2, -1, 2, 2).to(norm.weight)
    normalised = nn.BatchNorm2d.forward(alone.eval(), probe)  # without what the class adds to it
    if not bool((alone(probe) - after.eval()(normalised)).abs().max() < 1e-5):
        kind = type(norm).__name__
        raise ValueError(f"its {kind} does not only normalise and then call its children")
    return rest


def _check_distinct(net: nn.Module, found: Sequence[LastLayer]) -> None:
    for layer, times in Counter(last.layer for last in found).items():
        if times > 1:
            raise ValueError(f"{layer!r} is the last layer of {times} of the stages; name it once")
        ancestors = [layer.rsplit(".", dots)[0] for dots in range(layer.count(".") + 1)]
        if any(isinstance(net.get_submodule(path), Branches) for path in ancestors):
            raise ValueError(f"{layer!r} is in a branch already; add_branches to a plain network")


def _blank(net: nn.Module) -> Tensor:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            return module.weight.new_zeros(2, module.in_channels, 64, 64)
    kind = type(net).__name__
    raise ValueError(f"{kind} has no convolution that tells what a picture is; pass image")
