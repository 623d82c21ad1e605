"""What teachers say: from live networks, one by one, by name and on average."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kdcore.taps import Tapped
from kdcore.types import Batch, Outputs

Ensemble = Literal["probabilities", "logits"]  # the space in which teachers are averaged


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


def average_outputs(outputs: Sequence[Outputs], space: Ensemble) -> Outputs:
    r"""What several teachers say together: the logits of their mean prediction.

    .. math:: z = \log \frac1T \sum_t \operatorname{softmax}(z_t)
        \quad\text{or}\quad z = \frac1T \sum_t z_t

    The first is the arithmetic mean of the predictions, the second their geometric mean. A loss
    softens the average, it does not average what is softened. There are logits only, in float32 at
    least: features and classifiers of different networks have no mean. A single teacher's outputs
    are returned as they are.

    Raises ValueError for no outputs, and for teachers of different classes.

    Source: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 1.
    """
    if not outputs:
        raise ValueError("expected the outputs of at least one teacher, got none")
    if len(outputs) == 1:
        return outputs[0]
    shapes = {tuple(said.logits.shape) for said in outputs}
    if len(shapes) > 1:
        raise ValueError(f"teachers must have logits of the same shape, got {sorted(shapes)}")
    logits = torch.stack([_at_least_float32(said.logits) for said in outputs])
    if space == "logits":
        return Outputs(logits.mean(dim=0), {})
    return Outputs(logits.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(outputs)), {})


def heard(batch: Batch, label: str | None) -> Outputs | None:
    """What the teacher of this label says; for None the only teacher, or the average of several.

    Raises ValueError where the batch carries nothing of the labelled teacher.
    """
    if label is None:
        return batch.teacher
    if label not in batch.teachers:
        known = ", ".join(sorted(batch.teachers)) or "none"
        raise ValueError(f"the batch carries nothing of teacher {label!r}; it has: {known}")
    return batch.teachers[label]


def taught(
    batches: Iterable[Batch], teacher: Tapped, *, precision: torch.dtype = torch.float32
) -> Iterator[Batch]:
    """Each batch with what the frozen teacher says about its pictures.

    Raises ValueError for a teacher of which any part is in training mode, so that its BatchNorm
    statistics would move.
    """
    _check_frozen(teacher)
    for batch in batches:
        yield replace(batch, teacher=teacher_outputs(teacher, batch.image, precision=precision))


def taught_together(
    batches: Iterable[Batch],
    live: Mapping[str, Tapped],
    *,
    precision: Mapping[str, torch.dtype],
    space: Ensemble,
) -> Iterator[Batch]:
    """Each batch with what all of its teachers say, by label and as ``batch.teacher`` on average.

    They are those that the batch already carries and the frozen live ones. A batch without any
    teacher stays as it is. Raises ValueError like ``taught``.
    """
    for teacher in live.values():
        _check_frozen(teacher)
    for batch in batches:
        said = {
            label: teacher_outputs(teacher, batch.image, precision=precision[label])
            for label, teacher in live.items()
        }
        teachers = {**batch.teachers, **said}
        average = average_outputs(list(teachers.values()), space) if teachers else batch.teacher
        yield replace(batch, teacher=average, teachers=teachers)


def _check_frozen(teacher: Tapped) -> None:
    if any(module.training for module in teacher.modules()):
        raise ValueError("the teacher is in training mode; pass it through freeze() first")


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()
