"""Which student to keep where there is no data to test one on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from kdcore.teachers import heard
from kdcore.types import Batch


@torch.no_grad()
def agreement(student: nn.Module, batches: Iterable[Batch]) -> float:
    """The share of invented pictures for which the student chooses what its teacher does.

    On pictures that it was not trained on. The published codes keep the epoch that is best on the
    test set, which nobody without data can.

    Raises ValueError for no batches, and for batches without a teacher.
    """
    training = student.training
    student.eval()
    right = [_agrees(student, batch) for batch in batches]
    student.train(training)
    if not right:
        raise ValueError("there are no batches to agree on")
    return float(torch.cat(right).double().mean())


def _agrees(student: nn.Module, batch: Batch) -> torch.Tensor:
    said = heard(batch, None)
    if said is None:
        raise ValueError("the batch carries no teacher's outputs to agree with")
    agrees: torch.Tensor = student(batch.image).logits.argmax(dim=1) == said.logits.argmax(dim=1)
    return agrees
