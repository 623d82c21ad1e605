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

    Raises ValueError for a teacher in training mode, whose BatchNorm statistics would move.
    """
    if teacher.training:
        raise ValueError("the teacher is in training mode; pass it through freeze() first")
    for batch in batches:
        with torch.no_grad():
            outputs = teacher(batch.image)
        yield replace(batch, teacher=outputs)
