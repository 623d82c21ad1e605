"""What student and teacher say of the same held-out pictures, and how far apart they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.metrics.bounds import risk_bounds
from kdcore.taps import EMBEDDING, Tapped
from kdcore.teachers import heard
from kdcore.terms import present
from kdcore.types import Batch, Classifier, Outputs


class Matched(NamedTuple):
    """The embeddings of both networks for the same pictures, with both classifiers."""

    student: Float[Tensor, "n d"]
    teacher: Float[Tensor, "n e"]
    label: Int[Tensor, " n"]
    student_head: Classifier
    teacher_head: Classifier


def matched(student: Tapped, batches: Iterable[Batch], *, teacher: str | None = None) -> Matched:
    """Both networks on the batches, the student in evaluation mode; it is left as it came.

    ``teacher`` is the label of one of several; without it there is only one.
    """
    training, pairs = student.training, []
    student.eval()
    with torch.no_grad():
        for batch in batches:
            pairs.append((student(batch.image), present(heard(batch, teacher)), batch.label))
    student.train(training)
    here, there, labels = zip(*pairs, strict=True)
    return Matched(
        torch.cat([outputs.features[EMBEDDING] for outputs in here]).float(),
        torch.cat([outputs.features[EMBEDDING] for outputs in there]).float(),
        torch.cat(labels),
        _head(here[0]),
        _head(there[0]),
    )


def bounds(pair: Matched) -> dict[str, float]:
    """Both sides of the bounds on the difference of risks, named ``bounds/...``."""
    measured = risk_bounds(
        pair.student,
        pair.teacher,
        pair.label,
        student_head=pair.student_head,
        teacher_head=pair.teacher_head,
    )
    return {f"bounds/{name}": value for name, value in measured.scalars().items()}


def _head(outputs: Outputs) -> Classifier:
    if outputs.classifier is None:
        raise ValueError("these outputs do not carry their network's classifier")
    return outputs.classifier.to(torch.float32)
