"""The student's network as it is trained, and as it is used afterwards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdcore.checks import unknown_name
from kdcore.expansion import ExpandedStudent
from kdcore.kdiffusion.branches import add_branches, branch_taps
from kdcore.kdiffusion.fuse import fuse
from kdcore.losses.hints import bottleneck
from kdcore.quantisation import rounded, with_integers
from kdcore.reuse import ReusedClassifier
from kdcore.taps import EMBEDDING, Tapped
from kdcore.terms import present
from kdcore.types import Outputs
from pipelines.networks import ExpandConfig, ReuseConfig, StudentConfig


def as_trained(
    config: StudentConfig, net: nn.Module, image: Tensor, teacher: Outputs | None
) -> nn.Module:
    """The network in the form that its configuration gives it for training.

    ``image`` is a small batch, and ``teacher`` what the teacher says about it, for the shapes.
    """
    if config.branches is not None:
        form = config.branches
        return add_branches(
            net,
            form.stages,
            form.count,
            kinds=form.kinds,
            scale=form.scale,
            batch_norm=form.batch_norm,
            image=image,
        )
    if config.quantise is not None:
        return rounded(net, config.quantise.bits)
    form = config.reuse or config.expand
    if form is None:
        return net
    return _joined(net, form, image, present(teacher)).train()


def _joined(
    net: nn.Module, form: ReuseConfig | ExpandConfig, image: Tensor, teacher: Outputs
) -> nn.Module:
    tapped = Tapped(net.eval(), [form.layer])
    with torch.enable_grad():
        seen = tapped(torch.randn_like(image))  # blank pictures would hide what a layer does
    own, there = seen.features[form.layer], teacher.features[form.teacher_layer]
    for whose, held in (("student", own), ("teacher", there)):
        if held.ndim != 4:
            shape = tuple(held.shape)
            raise ValueError(f"expected a map (B, C, H, W) of the {whose}'s, got {shape}")
    if isinstance(form, ExpandConfig):
        _check_read(seen, form.layer, "student")
        width = form.copies * there.shape[1]
        return ExpandedStudent(net, form.layer, channels=own.shape[1], width=width)
    if teacher.classifier is None:
        raise ValueError("the teacher's outputs carry no classifier to reuse")
    _check_read(teacher, form.teacher_layer, "teacher")
    _freeze_above(net, own)
    between = bottleneck(own.shape, there.shape, reduction=form.reduction)
    return ReusedClassifier(net, form.layer, between, teacher.classifier)


def _check_read(said: Outputs, layer: str, whose: str) -> None:
    """That the classifier reads the mean of the map, else another one stands behind the join."""
    read, mean = said.features[EMBEDDING], said.features[layer].mean(dim=(2, 3))
    if read.shape != mean.shape or not bool((read - mean).abs().max() <= 1e-4 * read.abs().max()):
        raise ValueError(
            f"the {whose}'s classifier reads something else than the mean of {layer!r}"
        )


def _freeze_above(net: nn.Module, held: Tensor) -> None:
    """What the map is not made of would get no gradient, and DDP would wait for it."""
    own = [parameter for parameter in net.parameters() if parameter.requires_grad]
    used = torch.autograd.grad(held.square().sum(), own, allow_unused=True)
    for parameter, gradient in zip(own, used, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)


def as_used(net: nn.Module) -> nn.Module:
    """A copy as plain as it can be: branches fused into one layer, an expansion folded away.

    Of rounded layers the weights become bytes. In evaluation mode it computes what ``net`` does, up
    to rounding.
    """
    net = net.eval()
    return net.folded() if isinstance(net, ExpandedStudent) else with_integers(fuse(net))


def layer_of(net: nn.Module, name: str) -> nn.Module:
    """The layer of that name; ValueError with the nearest name where there is none."""
    path, modules = layer_names(net).get(name, name), dict(net.named_modules())
    if path not in modules:
        raise ValueError(unknown_name("layer", name, {*layer_names(net), *modules} - {""}))
    return modules[path]


def layer_names(net: nn.Module) -> Mapping[str, str]:
    """Names of layers beside their paths: those of the plain network, and ``STAGE.branches``."""
    names = {f"{stage}.branches": path for stage, path in branch_taps(net).items()}
    if isinstance(net, ReusedClassifier | ExpandedStudent):
        own = {name for name, _ in net.named_children()}
        plain = [name for name, _ in net.student.net.named_modules() if name]
        names |= {name: f"student.net.{name}" for name in plain if name not in own}
    return names
