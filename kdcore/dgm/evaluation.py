"""What a student generates beside its teacher and beside data, never from shared noise by default.

Samples of shared noise are pairs: nearest neighbours then are of the other sample, and numbers say
more about the pairing than about the distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.dgm.row_noise import NoiseSource
from kdcore.dgm.trace import TargetValue, Trace
from kdcore.metrics.two_samples import sample_distances

Features = Callable[[Mapping[str, Tensor]], Tensor]  # targets by name to (rows, width)

_NO_TENSORS: Mapping[str, Tensor] = MappingProxyType({})


def values_as_features(targets: Mapping[str, Tensor]) -> Float[Tensor, "n d"]:
    """The numbers of all targets side by side: pixels of pictures, coordinates of strokes."""
    return torch.cat([value.flatten(1) for value in targets.values()], dim=1)


def generation_distances(
    teacher: nn.Module,
    student: nn.Module,
    num_rows: int,
    *,
    features: Features = values_as_features,
    targets: TargetValue = "draw",
    inputs: Mapping[str, Tensor] = _NO_TENSORS,
    data: Mapping[str, Tensor] = _NO_TENSORS,
    paired: bool = False,
    generator: NoiseSource | None = None,
) -> dict[str, float]:
    """``sample_distances`` under the names "<comparison>/<distance>", and the number of rows.

    "teacher" is the student against the teacher, from independent noise; "floor" the teacher
    against itself, from independent noise; "data" and "teacher_data" the two against ``data``,
    where there is any; "paired" student against teacher from the same noise, where asked for.
    ``targets`` "mean" compares what is shown of pictures, without their pixels' noise.

    Raises ValueError for a model in training mode, whose BatchNorm would move.
    """
    for name, model in (("teacher", teacher), ("student", student)):
        if model.training:
            raise ValueError(f"the {name} is in training mode; call its eval() first")

    def run(model: nn.Module, noise: Mapping[str, Tensor] = _NO_TENSORS) -> Trace:
        trace = Trace(num_rows, inputs=inputs, noise=noise, targets=targets, generator=generator)
        with torch.no_grad():
            model(trace)
        return trace

    def seen(trace: Trace) -> Tensor:
        return features(trace.values("target"))

    first = run(teacher)
    of_teacher, of_student = seen(first), seen(run(student))
    pairs = {"teacher": (of_student, of_teacher), "floor": (seen(run(teacher)), of_teacher)}
    if data:
        real = features(data)
        pairs |= {"data": (of_student, real), "teacher_data": (of_teacher, real)}
    if paired:
        pairs["paired"] = (seen(run(student, first.noise())), of_teacher)
    found = {
        f"{comparison}/{name}": value
        for comparison, pair in pairs.items()
        for name, value in sample_distances(*pair).items()
    }
    return {"rows": float(num_rows), **found}
