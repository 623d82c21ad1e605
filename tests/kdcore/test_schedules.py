"""Schedules, and a step that follows them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kdcore.losses import LOSSES
from kdcore.losses.logits import kd
from kdcore.models import MODELS
from kdcore.schedules import Cosine, Schedule, Steps, Warmup
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.types import Batch, Probe


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Warmup(2.0, 4.0), {0.0: 0.0, 1.0: 0.5, 4.0: 2.0, 9.5: 2.0}),
        (Cosine(1.0, 0.0, 10.0), {0.0: 1.0, 5.0: 0.5, 10.0: 0.0, 12.0: 0.0}),
        (Cosine(1.0, 3.0, 10.0), {0.0: 1.0, 10 / 3: 1.5, 10.0: 3.0}),
        (Steps({0: 1.0, 3: 0.1}), {0.0: 1.0, 2.9: 1.0, 3.0: 0.1, 8.0: 0.1}),
    ],
)
def test_a_schedule_takes_its_values_at_its_epochs(
    schedule: Schedule, values: dict[float, float]
) -> None:
    for epoch, value in values.items():
        assert schedule(epoch) == pytest.approx(value, abs=1e-12), epoch


def test_a_step_follows_the_schedules_of_weights_and_parameters() -> None:
    student = Tapped(MODELS["convnet"](5, width=1))
    image, label = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        teacher = Tapped(MODELS["convnet"](5, width=2))(image)
    batch = Batch(image, label, torch.arange(4), teacher)
    params = {"temperature": Cosine(4.0, 1.0, 10.0)}
    term = LOSSES["kd"].build(params, {}, Probe(teacher, batch))
    step = DistillStep(student, {"kd": term}, {"kd": Warmup(3.0, 8.0)}).eval()
    for epoch, weight, temperature in ((0.0, 0.0, 4.0), (5.0, 1.875, 2.5), (10.0, 3.0, 1.0)):
        result = step(replace(batch, epoch=epoch))
        expected = kd(student(image).logits, teacher.logits, temperature=temperature)
        torch.testing.assert_close(result.parts["kd"], expected.detach())
        torch.testing.assert_close(result.loss, weight * expected)
