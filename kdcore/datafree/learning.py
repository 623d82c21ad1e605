"""What the student of a data-free method learns by: the losses that the method publishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from kdcore.datafree.plans import Distilled, Method
from kdcore.losses import LOSSES
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.teachers import teacher_outputs
from kdcore.types import Batch, Probe


def published_step(
    method: Method,
    student: Tapped,
    teacher: Tapped,
    *,
    shape: Sequence[int],
    layers: Mapping[str, str] = MappingProxyType({}),
) -> DistillStep:
    """The student with the method's own losses; any others of ``LOSSES`` may take their place.

    ``layers`` (the student's to the teacher's) are for losses on maps, which both must tap.

    Raises ValueError where the method compares maps and no layers are given.
    """
    terms, weights = {}, {}
    probe = _probe(student, teacher, shape)
    for name, one in method.losses.items():
        if one.maps and not layers:
            raise ValueError(
                f"the method's loss {name!r} compares maps: name pairs of `layers`, the student's "
                "and the teacher's, or leave it out"
            )
        pairs = layers if one.maps else LOSSES[name].default_layers
        terms[name] = LOSSES[name].build(one.params, pairs, probe)
        weights[name] = _weight(one, probe)
    return DistillStep(student, terms, weights)


def _weight(one: Distilled, probe: Probe) -> float:
    return one.weight / probe.student.logits.shape[1] if one.per_class else one.weight


def _probe(student: Tapped, teacher: Tapped, shape: Sequence[int]) -> Probe:
    """Two blank pictures; the student keeps the statistics that it had."""
    weight: Tensor = next(student.parameters())
    image = weight.new_zeros(2, *shape)
    rows = torch.arange(2, device=image.device)
    batch = Batch(image, torch.zeros_like(rows), rows, teacher=teacher_outputs(teacher, image))
    training = student.training
    said = teacher_outputs(student.eval(), image)
    student.train(training)
    return Probe(said, batch)
