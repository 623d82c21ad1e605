"""A student that widens its last map for the loss, and folds that away afterwards."""

from __future__ import annotations

import copy
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.taps import EMBEDDING, Tapped


class ExpandedStudent(nn.Module):
    r"""A network whose last map takes a linear detour over more channels before its classifier.

    .. math:: \mathrm{logits} = W \, \mathrm{mean}_{hw} \big( x + C(E(x)) \big) + b

    with E to ``width`` channels and C back to ``channels``, each a 1x1 convolution and BatchNorm.
    ``layer`` is the map x, whose mean must be the input of the classifier. The network is the one
    given, not a copy. The loss ``norm`` takes the layer ``expand``.

    Source: Liu and others 2023 (NORM), arXiv:2305.13803, section 3, with the shortcut of their
    code.
    """

    def __init__(self, net: nn.Module, layer: str, *, channels: int, width: int) -> None:
        super().__init__()
        self.student = Tapped(net, [layer])
        self.layer = layer
        self.expand = _linear(channels, width)
        self.contract = _linear(width, channels)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        seen = self.student(image)
        detour = self.contract(self.expand(seen.features[self.layer]))
        # the network's own classifier again, so that Tapped sees the embedding it really gets
        classifier = self.student.net.get_submodule(self.student.classifier)
        logits: Tensor = classifier(seen.features[EMBEDDING] + detour.mean(dim=(2, 3)))
        return logits

    @torch.no_grad()
    def folded(self) -> nn.Module:
        r"""A copy of the plain network with the logits that this one has in evaluation.

        .. math:: W' = W (I + C E), \quad b' = b + W (C e + c)

        All of the detour is linear and commutes with the mean, so that the classifier takes it up.
        """
        net = copy.deepcopy(self.student.net)
        classifier = cast(nn.Linear, net.get_submodule(self.student.classifier))
        expand, expand_shift = _affine(self.expand)
        contract, contract_shift = _affine(self.contract)
        weight = classifier.weight.double()
        shift = weight @ (contract @ expand_shift + contract_shift)
        own = 0.0 if classifier.bias is None else classifier.bias.double()
        classifier.bias = nn.Parameter((own + shift).to(classifier.weight))
        classifier.weight.copy_(weight + weight @ contract @ expand)
        return net


def _linear(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def _affine(layer: nn.Sequential) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"]]:
    """Weight and bias of a convolution and a BatchNorm in evaluation, as one, in float64."""
    held = {name: value.double() for name, value in layer.state_dict().items()}
    scale = held["1.weight"] / (held["1.running_var"] + cast(nn.BatchNorm2d, layer[1]).eps).sqrt()
    weight = held["0.weight"].flatten(1) * scale[:, None]
    return weight, held["1.bias"] - held["1.running_mean"] * scale
