"""A network that also returns the outputs of its named layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from kdcore.checks import unknown_name
from kdcore.pooling import pooling_of, split_pooling
from kdcore.types import Classifier, Outputs

EMBEDDING = "embedding"


def classifier_name(net: nn.Module) -> str:
    """The path of the last linear layer, whose input is the embedding."""
    linear: list[str] = [
        name for name, module in net.named_modules() if isinstance(module, nn.Linear)
    ]
    if not linear:
        raise ValueError(
            f"{type(net).__name__} has no nn.Linear, so it has no classifier whose input could be "
            "the embedding; use a network that ends in one"
        )
    return linear[-1]


class Tapped(nn.Module):
    """``Tapped(net, layers)(image) -> Outputs``: logits, embedding and named layers in one pass.

    A layer is a module path such as ``"layer2"`` or ``"blocks.3.norm1"``; its feature is the
    module's output, and for a module that runs several times the last one; of ``"layer2@gap"`` only
    what ``kdcore.pooling`` keeps of it. ``aliases`` are further names, for paths. The taps exist
    only while the network runs, so that copies, pickles and state dicts of ``net`` are untouched.

    Raises ValueError for a layer that the network does not have, with the nearest name, and for a
    pooling that there is not.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Iterable[str] = (),
        *,
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.net = net
        self.layers = tuple(dict.fromkeys(name for name in layers if name != EMBEDDING))
        self.classifier = classifier_name(net)
        self._paths = {name: _path(name, aliases) for name in self.layers}
        modules = dict(net.named_modules())
        for name, path in self._paths.items():
            pooling_of(name)
            if path not in modules:
                known = {EMBEDDING, *aliases, *(known for known in modules if known)}
                raise ValueError(unknown_name(f"layer of {type(net).__name__}", path, known))

    def forward(self, image: Float[Tensor, "b c h w"]) -> Outputs:
        features: dict[str, Tensor] = {}

        def keep_output(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            pooled = pooling_of(name)

            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                if not isinstance(output, Tensor):
                    kind = type(output).__name__
                    raise ValueError(f"layer {name!r} gives a {kind}, not a tensor to compare")
                features[name] = pooled(output)

            return hook

        def keep_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features[EMBEDDING] = inputs[0]

        with ExitStack() as taps:
            classifier = self.net.get_submodule(self.classifier)
            taps.callback(classifier.register_forward_pre_hook(keep_input).remove)
            for name, path in self._paths.items():
                tap = self.net.get_submodule(path).register_forward_hook(keep_output(name))
                taps.callback(tap.remove)
            logits = self.net(image)
        return Outputs(logits, features, self.head)

    @property
    def head(self) -> Classifier:
        """Weight and bias of the classifier, live: they have the network's own graph."""
        linear = cast(nn.Linear, self.net.get_submodule(self.classifier))
        weight, bias = linear.weight, linear.bias
        return Classifier(weight, weight.new_zeros(len(weight)) if bias is None else bias)


def _path(layer: str, aliases: Mapping[str, str]) -> str:
    """The module that a layer names, whatever is kept of its output."""
    name, _ = split_pooling(layer)
    return aliases.get(name, name)
