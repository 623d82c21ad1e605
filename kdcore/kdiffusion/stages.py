"""The last linear map of a stage, and the BatchNorm that reads it, found by running the network.

Neither the order in which modules are registered nor that in which they run says which convolution
is a block's last: shortcuts come before or after. So the graph of one forward pass is followed back
from the stage's output along the longest path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm

from kdcore.checks import unknown_name


class LastLayer(NamedTuple):
    """The paths of a stage, of its last convolution or linear layer, and of that one's norm."""

    stage: str
    layer: str
    norm: str | None


def last_layers(
    net: nn.Module, stages: Iterable[str], image: Float[Tensor, "b ..."]
) -> list[LastLayer]:
    """The last convolution or linear layer of each stage, on the path through most of them.

    A stage is the path of any module: a layer is its own stage. Its norm is the BatchNorm that
    alone reads its output. The network runs once, in evaluation mode, and is left as it came.

    Raises ValueError for a stage that the network does not have or that holds no such layer, and
    for a layer that runs more than once.
    """
    names, stages = dict(net.named_modules()), list(stages)
    for stage in stages:
        if stage not in names or not stage:
            known = {known for known in names if known}
            raise ValueError(unknown_name(f"layer of {type(net).__name__}", stage, known))
    trace = _traced(net, stages, image)
    return [_last_layer(stage, trace) for stage in stages]


@dataclass
class _Trace:
    """Nodes of the graph of one forward pass, by what made or reads them."""

    layers: dict[Node, str] = field(default_factory=dict)  # made by a convolution or linear layer
    norms: dict[Node, str] = field(default_factory=dict)  # read by a BatchNorm
    stages: dict[str, Node] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    depth: Mapping[Node, int] = field(default_factory=dict)  # layers on the longest path to it
    readers: Counter[Node] = field(default_factory=Counter)


def _last_layer(stage: str, trace: _Trace) -> LastLayer:
    node: Node | None = trace.stages.get(stage)
    while node is not None and node not in trace.layers:
        node = max(_parents(node), key=trace.depth.__getitem__, default=None)
    layer = trace.layers[node] if node is not None else ""
    if node is None or not f"{layer}.".startswith(f"{stage}."):
        raise ValueError(
            f"{stage!r} has no convolution or linear layer on the way to its output, so nothing "
            "that could become branches; name another stage"
        )
    if trace.calls[layer] != 1:
        raise ValueError(f"{layer!r} runs {trace.calls[layer]} times a picture, expected once")
    norm = trace.norms.get(node) if trace.readers[node] == 1 else None
    return LastLayer(stage, layer, norm)


def _traced(net: nn.Module, stages: Iterable[str], image: Tensor) -> _Trace:
    trace = _Trace()
    with ExitStack() as hooks, _evaluating(net), torch.enable_grad():
        for name, module in net.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                hooks.callback(module.register_forward_hook(_made(trace, name)).remove)
            if isinstance(module, _BatchNorm):
                hooks.callback(module.register_forward_pre_hook(_read(trace, name)).remove)
        for stage in stages:
            module = net.get_submodule(stage)
            hooks.callback(module.register_forward_hook(_left(trace, stage)).remove)
        logits = net(image.detach().requires_grad_())
    nodes = _below(logits.grad_fn)
    trace.readers.update(parent for node in nodes for parent in _parents(node))
    trace.depth = _depths(nodes, trace.layers)
    return trace


def _made(trace: _Trace, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        trace.calls[name] += 1
        if output.grad_fn is not None:
            trace.layers[output.grad_fn] = name

    return hook


def _read(trace: _Trace, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].grad_fn is not None:
            trace.norms[inputs[0].grad_fn] = name

    return hook


def _left(trace: _Trace, stage: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            trace.stages[stage] = output.grad_fn

    return hook


def _parents(node: Node) -> list[Node]:
    return [parent for parent, _ in node.next_functions if parent is not None]


def _below(node: Node | None) -> list[Node]:
    """The node and all that it was computed from, every node after those it needs."""
    ordered: dict[Node, None] = {}
    waiting = [] if node is None else [node]
    while waiting:  # a recursion would be as deep as the network
        missing = [parent for parent in _parents(waiting[-1]) if parent not in ordered]
        if missing:
            waiting.extend(missing)
        else:
            ordered[waiting.pop()] = None
    return list(ordered)


def _depths(nodes: Iterable[Node], layers: Mapping[Node, str]) -> dict[Node, int]:
    depth: dict[Node, int] = {}
    for node in nodes:
        before = max((depth[parent] for parent in _parents(node)), default=0)
        depth[node] = before + (node in layers)
    return depth


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which statistics do not move; then each module's own mode again."""
    training = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
