"""Teacher outputs from a live network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from kdcore.taps import Tapped
from kdcore.types import Batch


def freeze(teacher: Tapped) -> Tapped:
    """The same network in evaluation mode, with no parameter that asks for a gradient."""
    return teacher.requires_grad_(False).eval()


def taught(batches: Iterable[Batch], teacher: Tapped) -> Iterator[Batch]:
    """Each batch with what the frozen teacher says about its pictures.

    Raises ValueError for a teacher of which any part is in training mode, so that its BatchNorm
    statistics would move.
    """
    if any(module.training for module in teacher.modules()):
        raise ValueError("the teacher is in training mode; pass it through freeze() first")
    for batch in batches:
        with torch.no_grad():
            outputs = teacher(batch.image)
        yield replace(batch, teacher=outputs)
