"""Teacher outputs from a live network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from kdcore.taps import Tapped
from kdcore.types import Batch, Outputs


def freeze(teacher: Tapped) -> Tapped:
    """The same network in evaluation mode, with no parameter that asks for a gradient."""
    return teacher.requires_grad_(False).eval()


def teacher_outputs(
    teacher: Tapped, image: Float[Tensor, "b c h w"], *, precision: torch.dtype = torch.float32
) -> Outputs:
    """What the teacher says about pictures, without a graph; autocast to a lower precision.

    The one forward pass of a teacher, whether its outputs are kept or used at once.
    """
    lower = precision is not torch.float32
    with torch.no_grad(), torch.autocast(image.device.type, precision, enabled=lower):
        outputs: Outputs = teacher(image)
    return outputs


def taught(
    batches: Iterable[Batch], teacher: Tapped, *, precision: torch.dtype = torch.float32
) -> Iterator[Batch]:
    """Each batch with what the frozen teacher says about its pictures.

    Raises ValueError for a teacher of which any part is in training mode, so that its BatchNorm
    statistics would move.
    """
    if any(module.training for module in teacher.modules()):
        raise ValueError("the teacher is in training mode; pass it through freeze() first")
    for batch in batches:
        yield replace(batch, teacher=teacher_outputs(teacher, batch.image, precision=precision))
