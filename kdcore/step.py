"""The one module that is trained: a student and its weighted losses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from kdcore.checks import unknown_name
from kdcore.losses import Term
from kdcore.losses.logits import cross_entropy
from kdcore.schedules import Schedule
from kdcore.taps import Tapped
from kdcore.teachers import heard
from kdcore.types import Batch, Outputs, StepResult

CROSS_ENTROPY = "ce"


class DistillStep(nn.Module):
    r"""``Batch -> StepResult``: the weighted sum of a run's losses, as one module for DDP to wrap.

    .. math:: \mathcal L = \sum_\ell w_\ell \, \mathcal L_\ell(\text{student}, \text{teacher})

    A weight is a number or a schedule over the epochs that the batch says have been trained.
    ``listens_to`` maps a term to the label of its teacher; the others hear ``batch.teacher``.
    The losses see float32 (or float64) whatever autocast says. Cross-entropy is computed even when
    no term names it, then with weight 0: without it the classifier would have no gradient, and DDP
    would stop.
    """

    def __init__(
        self,
        student: Tapped,
        terms: Mapping[str, Term],
        weights: Mapping[str, float | Schedule],
        listens_to: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        if set(terms) != set(weights):
            raise ValueError(
                f"every term needs one weight: terms {sorted(terms)}, weights {sorted(weights)}"
            )
        for label in listens_to:
            if label not in terms:
                raise ValueError(unknown_name("term", label, terms))
        taken = [label for label in terms if hasattr(nn.ModuleDict(), label)]
        if taken:
            raise ValueError(f"{taken[0]!r} cannot name a term: torch has a use for it; rename it")
        self.student = student
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)
        self.listens_to = dict(listens_to)

    def forward(self, batch: Batch) -> StepResult:
        outputs = self.student(batch.image)
        with torch.autocast(batch.image.device.type, enabled=False):
            parts = self._parts(_full_precision(outputs), batch)
            weighted = [self._weight(label, batch.epoch) * part for label, part in parts.items()]
            loss = torch.stack(weighted).sum()
        detached = {label: part.detach() for label, part in parts.items()}
        return StepResult(loss, detached, outputs.logits.detach())

    def _weight(self, label: str, epoch: float) -> float:
        weight = self.weights.get(label, 0.0)
        return weight(epoch) if isinstance(weight, Schedule) else weight

    def _parts(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        teachers = {self.listens_to.get(label) for label in self.terms}
        said = {teacher: _heard_in_full(batch, teacher) for teacher in teachers}
        parts = {
            label: term(student, said[self.listens_to.get(label)], batch)
            for label, term in self.terms.items()
        }
        if CROSS_ENTROPY not in parts:
            parts[CROSS_ENTROPY] = cross_entropy(
                student.logits, batch.target(student.logits.shape[1])
            )
        return parts


def _heard_in_full(batch: Batch, teacher: str | None) -> Outputs | None:
    outputs = heard(batch, teacher)
    return None if outputs is None else _full_precision(outputs)


def _full_precision(outputs: Outputs) -> Outputs:
    return outputs if outputs.logits.dtype is torch.float64 else outputs.to(torch.float32)
