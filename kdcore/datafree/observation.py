"""What a teacher says of pictures, and what its BatchNorms see of them meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.batch_norm import BatchNorm, moments
from kdcore.datafree.statistics import Moments
from kdcore.taps import Tapped
from kdcore.types import Outputs

BATCH_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    BatchNorm,
)


@dataclass(frozen=True)
class Observation:
    """The teacher's outputs and, in the order in which they ran, the inputs of its BatchNorms.

    A module that runs twice is there twice.
    """

    outputs: Outputs
    inputs: tuple[Float[Tensor, "b _ ..."], ...]
    running: tuple[Moments, ...]

    @property
    def moments(self) -> tuple[Moments, ...]:
        """Of each BatchNorm's input, over the rows of all workers."""
        return tuple(Moments(*moments(maps)) for maps in self.inputs)

    @property
    def instance(self) -> Float[Tensor, "b channels"]:
        """Each picture's mean over positions in every channel of every BatchNorm's input."""
        return torch.cat([maps.flatten(2).mean(dim=2) for maps in self.inputs], dim=1)


def has_batch_norm(net: nn.Module) -> bool:
    """Whether any BatchNorm of the network has kept statistics of its data."""
    return any(_keeps_statistics(module) for module in net.modules())


def observe(teacher: Tapped, image: Float[Tensor, "b c h w"]) -> Observation:
    """One pass of pictures through a frozen teacher, with the graph of the pictures.

    The statistics are read at the input of each BatchNorm, which itself stays in evaluation mode:
    in training mode it would normalise with the invented pictures and forget the real ones. The
    taps exist only while the network runs.
    """
    inputs: list[Tensor] = []
    running: list[Moments] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs.append(given[0])
        running.append(Moments(module.get_buffer("running_mean"), module.get_buffer("running_var")))

    with ExitStack() as taps:
        for module in teacher.net.modules():
            if _keeps_statistics(module):
                hook: Callable[..., Any] = keep
                taps.callback(module.register_forward_pre_hook(hook).remove)
        outputs = teacher(image)
    return Observation(outputs, tuple(inputs), tuple(running))


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, BATCH_NORMS) and module.running_mean is not None
