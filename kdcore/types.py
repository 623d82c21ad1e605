"""The nouns: what a network says, what a batch carries, what a step returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outputs:
    """What one network says about one batch.

    ``features`` maps layer names to tensors whose first dimension is the batch; ``"embedding"`` is
    the input of the classifier.
    """

    logits: Float[Tensor, "b k"]
    features: Mapping[str, Shaped[Tensor, "b ..."]]

    def to(self, target: torch.device | torch.dtype) -> Outputs:
        """The same outputs on a device, or with another floating-point type."""
        features = {layer: feature.to(target) for layer, feature in self.features.items()}
        return Outputs(self.logits.to(target), features)


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures, labels and what the teacher said about them, wherever that came from."""

    image: Float[Tensor, "b c h w"]
    label: Int[Tensor, " b"]
    index: Int[Tensor, " b"]  # row number in the dataset
    teacher: Outputs | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        teacher = None if self.teacher is None else self.teacher.to(device)
        return replace(
            self,
            image=self.image.to(device),
            label=self.label.to(device),
            index=self.index.to(device),
            teacher=teacher,
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """One forward pass of both networks over a tiny batch: tells a loss the shapes it will meet."""

    student: Outputs
    batch: Batch  # its ``teacher`` is None where the run has none


@dataclass(frozen=True, slots=True)
class StepResult:
    """The loss with its graph, the parts it is the weighted sum of (detached), the logits."""

    loss: Float[Tensor, ""]
    parts: Mapping[str, Float[Tensor, ""]]
    logits: Float[Tensor, "b k"]
