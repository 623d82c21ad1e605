"""The nouns: what a network says, what a batch carries, what a step returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor


class Classifier(NamedTuple):
    """The last linear layer of a network: ``logits = embedding @ weight.T + bias``."""

    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]

    def to(self, target: torch.device | torch.dtype) -> Classifier:
        return Classifier(self.weight.to(target), self.bias.to(target))


@dataclass(frozen=True, slots=True)
class Outputs:
    """What one network says about one batch, and the classifier with which it says it.

    ``features`` maps layer names to tensors whose first dimension is the batch; ``"embedding"`` is
    the input of the classifier.
    """

    logits: Float[Tensor, "b k"]
    features: Mapping[str, Shaped[Tensor, "b ..."]]
    classifier: Classifier | None = None

    def to(self, target: torch.device | torch.dtype) -> Outputs:
        """The same outputs on a device, or with another floating-point type."""
        features = {layer: feature.to(target) for layer, feature in self.features.items()}
        classifier = None if self.classifier is None else self.classifier.to(target)
        return Outputs(self.logits.to(target), features, classifier)


@dataclass(frozen=True, slots=True)
class Mix:
    """The other picture in each picture of a batch that mixes two: its label, and who has how much.

    A picture that is not mixed keeps all of its share.
    """

    label: Int[Tensor, " b"]
    share: Float[Tensor, " b"]  # in [0, 1], of the batch's own label; the other has the rest

    def to(self, device: torch.device) -> Mix:
        return Mix(self.label.to(device), self.share.to(device))


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures, labels and what their teachers said about them, wherever that came from."""

    image: Float[Tensor, "b c h w"]
    label: Int[Tensor, " b"]
    index: Int[Tensor, " b"]  # row number in the dataset
    teacher: Outputs | None = None  # the only teacher's, or the average of several
    epoch: float = 0.0  # how many have been trained on when this batch comes, as a fraction
    teachers: Mapping[str, Outputs] = field(default_factory=dict)  # by label
    mix: Mix | None = None  # where pictures are made of two, so that ``label`` is half of the truth

    def target(self, num_classes: int) -> Int[Tensor, " b"] | Float[Tensor, "b k"]:
        """The labels; of mixed pictures the share of every class."""
        if self.mix is None:
            return self.label
        own, other = (F.one_hot(label, num_classes) for label in (self.label, self.mix.label))
        share = self.mix.share[:, None]
        return share * own + (1 - share) * other

    def right(self, predicted: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Of each picture the share that a prediction names: 0 or 1 unless it is mixed.

        Source: Zhang and others 2018, arXiv:1710.09412, the training accuracy of their code.
        """
        own = (predicted == self.label).float()
        if self.mix is None:
            return own
        return own.lerp((predicted == self.mix.label).float(), 1 - self.mix.share)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        teacher = None if self.teacher is None else self.teacher.to(device)
        return replace(
            self,
            image=self.image.to(device),
            label=self.label.to(device),
            index=self.index.to(device),
            teacher=teacher,
            teachers={label: said.to(device) for label, said in self.teachers.items()},
            mix=None if self.mix is None else self.mix.to(device),
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """One forward pass of both networks over a tiny batch: tells a loss the shapes it will meet.

    The values mean nothing: the pictures are blank and the teacher need not have its weights.
    """

    student: Outputs
    batch: Batch  # its ``teacher`` is None where the run has none
    num_rows: int = 0  # of the dataset, above every ``Batch.index``; 0 where nobody knows


@dataclass(frozen=True, slots=True)
class StepResult:
    """The loss with its graph, the parts it is the weighted sum of (detached), the logits."""

    loss: Float[Tensor, ""]
    parts: Mapping[str, Float[Tensor, ""]]
    logits: Float[Tensor, "b k"]
