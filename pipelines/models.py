"""Networks by name, with their weights."""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcore.checks import unknown_name
from kdcore.models import MODELS
from pipelines.networks import SMALL_RESNETS, ModelConfig


def build_network(model: ModelConfig, *, num_classes: int, in_channels: int) -> nn.Module:
    """The named network, with the run's classes and channels and, if given, its weights.

    Where torchvision's residual blocks end in a ReLU, the sum before it is a layer as well, such as
    ``layer4.1.relu.preactivation``.

    Raises ValueError for an unknown name, parameters that its constructor does not take, a stem
    that cannot be made small, and weights of another network.
    """
    if model.name in SMALL_RESNETS:
        model = model.model_copy(update={"name": SMALL_RESNETS[model.name], "stem": "small"})
    library, _, name = model.name.rpartition("/")
    make = {"": _ours, "timm": _timm, "torchvision": _torchvision}[library]
    try:
        net = make(name, num_classes, in_channels, model.params)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot build {model.name} with params {model.params}: {error}") from None
    if model.stem == "small":
        _make_stem_small(net)
    if model.weights is not None:
        load_weights(net, model.weights)
    return net


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a state dict from safetensors, or from a .pth that holds tensors only.

    A prefix ``module.`` that DataParallel or DDP has left is removed, and a classifier ``fc`` is
    read where the network calls its own ``linear``. Raises ValueError that names the first tensor
    that is missing, not expected, or of another shape.
    """
    own = net.state_dict()
    state = _under_names_of(own, read_weights(path))
    problems = [
        *(f"lacks {name}" for name in own if name not in state),
        *(f"has {name}, unknown to the network" for name in state if name not in own),
        *(
            f"has {name} of shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ),
    ]
    if problems:
        raise ValueError(
            f"weights {path} are not of this {type(net).__name__}: the file {problems[0]} "
            f"({len(problems)} of {len(own)} tensors do not fit)"
        )
    net.load_state_dict(state)


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors."""
    save_file({name: held.detach().cpu().contiguous() for name, held in state.items()}, path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a .pth that holds them.

    A .pth is a state dict, or a checkpoint with one under ``state_dict`` or ``model``.
    """
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything
        kind = type(error).__name__  # torch's own words advise to load code
        raise ValueError(f"weights {path} cannot be read as tensors only ({kind})") from None
    if isinstance(state, dict):
        state = state.get("state_dict", state.get("model", state))
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not state or not all(isinstance(held, Tensor) for held in state.values()):
        raise ValueError(f"weights {path} are not a state dict of tensors")
    return dict(state)


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint of a run; ValueError where it is damaged, or holds code, which is not run."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # as of weights
        kind = type(error).__name__
        raise ValueError(
            f"checkpoint {path} cannot be read as tensors and numbers only ({kind}); remove its "
            "folder to begin the run anew"
        ) from None
    return state


def weights_digest(net: nn.Module) -> str:
    """sha256 of the names, types and values of a state dict."""
    content = hashlib.sha256()
    for name, held in sorted(net.state_dict().items()):
        content.update(f"{name} {held.dtype} {tuple(held.shape)}".encode())
        content.update(held.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()


class Served(nn.Module):
    """A network that takes pixels as they are stored: uint8 (B, C, H, W) to logits."""

    def __init__(self, net: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.net((image.float() / 255 - self.mean) / self.std)
        return logits


def _under_names_of(own: Container[str], read: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {name.removeprefix("module."): held for name, held in read.items()}
    if "linear.weight" not in own or any(name.startswith("linear.") for name in state):
        return state
    ours = {"fc.weight": "linear.weight", "fc.bias": "linear.bias"}
    return {ours.get(name, name): held for name, held in state.items()}


def _ours(name: str, num_classes: int, in_channels: int, params: Mapping[str, Any]) -> nn.Module:
    make: Callable[..., nn.Module] = MODELS[name]
    known = [
        parameter.name
        for parameter in inspect.signature(make).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for key in params:
        if key not in known:
            raise ValueError(unknown_name(f"parameter of network {name}", key, known))
    return make(num_classes, in_channels, **params)


def _timm(name: str, num_classes: int, in_channels: int, params: Mapping[str, Any]) -> nn.Module:
    import timm  # 2 s to import: paid only by who names one of its networks

    if not timm.is_model(name):
        raise ValueError(unknown_name("timm network", name, timm.list_models()))
    return timm.create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **params
    )


def _torchvision(
    name: str, num_classes: int, in_channels: int, params: Mapping[str, Any]
) -> nn.Module:
    from torchvision import models
    from torchvision.models.resnet import BasicBlock, Bottleneck

    if name not in models.list_models(models):
        raise ValueError(unknown_name("torchvision network", name, models.list_models(models)))
    net = models.get_model(name, weights=None, num_classes=num_classes, **params)
    path, first = _first_convolution(net)
    if first.in_channels != in_channels:
        _replace(net, path, _like(first, in_channels=in_channels))
    for path, module in list(net.named_modules()):
        if isinstance(module, BasicBlock | Bottleneck):
            _name_preactivation(net, path + ".relu")
    return net


def _name_preactivation(net: nn.Module, relu: str) -> None:
    """Give what a ReLU reads a path, ``<relu>.preactivation``, so that it can be tapped.

    A block of torchvision's ResNets has one ReLU for all of its places. A tap keeps what runs last,
    so this is the sum before the ReLU that ends the block.
    """
    parts = OrderedDict(preactivation=nn.Identity(), relu=net.get_submodule(relu))
    _replace(net, relu, nn.Sequential(parts))


def _make_stem_small(net: nn.Module) -> None:
    """For pictures of 32 pixels: the first convolution 3x3 at stride 1, no max-pool after it."""
    path, first = _first_convolution(net)
    pool = next((name for name in ("maxpool", "pool1") if hasattr(net, name)), None)
    if first.stride == (1, 1) or (pool is None and path != "features.0.0"):
        raise ValueError(
            f"{type(net).__name__} has no stem that can be made small: its first convolution "
            f"{path!r} has stride {first.stride}; leave `stem` out"
        )
    _replace(net, path, _like(first, kernel_size=3, stride=1, padding=1))
    if pool is not None:
        setattr(net, pool, nn.Identity())


def _first_convolution(net: nn.Module) -> tuple[str, nn.Conv2d]:
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    raise ValueError(f"{type(net).__name__} has no convolution whose input could be the picture")


def _like(conv: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    same = {
        key: getattr(conv, key)
        for key in ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    }
    return nn.Conv2d(**{**same, **changes}, bias=conv.bias is not None)


def _replace(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, module)
