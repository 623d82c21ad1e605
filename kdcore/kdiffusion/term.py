r"""The loss of KDiffusion: branches of the student walk from noise to the teacher's feature.

Where branches and loss meet: the outputs of the branches of one layer are one feature of the
student, ``"<layer>.branches"``, of shape (B, branches, ...). It passes through ``Outputs.features``
like any other, and nothing is kept in the network. A plain layer is one branch.

Which branch serves which step is drawn anew for every batch, from a seed and ``batch.epoch``, which
says how far training has come. The seed is drawn at construction like an initial weight, so it
follows the run's seed and is saved with the term. There is no counter: every worker draws the same
order because it has the same seed and epoch, a resumed run goes on as the undisturbed one, the same
batch gives the same loss, and only tensors are involved, so that the compiler sees one graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from kdcore.kdiffusion.assignment import Assignment, Order
from kdcore.kdiffusion.bridge import Bridge, Bridged
from kdcore.kdiffusion.guidance import guided_layer, target_guidance
from kdcore.kdiffusion.likelihood import Reading, Walk, gaussian_nll
from kdcore.kdiffusion.schedule import NoiseSchedule, reverse_steps
from kdcore.kdiffusion.variance import PredictedVariance, Variance
from kdcore.terms import Term, feature_of, present
from kdcore.types import Batch, Outputs, Probe

Variant = Literal["x0", "rollout", "trajectory", "average"]
StudentVariance = Literal["batch", "unit"]

_SMALLEST = 1e-4  # of the student's variance


class ReverseDiffusion(Term):
    r"""Mean negative log-likelihood of the teacher's feature over the steps of a reverse diffusion.

    .. math:: \mathcal L = \sum_{\text{layers}} \frac{1}{mC} \sum_{jc} \tfrac12 \Big(
        \log V_{jc} + \frac{e_{jc}^2 + \nu_j \sigma_c^2}{V_{jc}} \Big)
        + \lambda \, \mathcal L_\text{guidance}

    The estimate of step j is made of the branches, by ``assignment.shares`` in an order that is
    drawn for every batch ("shuffle") or stays ("strict"); the number of steps need not be that of
    branches. Its mean squared error e^2, and the noise :math:`\nu` in it, follow from ``variant``
    (``likelihood``); "average" is "x0" in one step, so that the estimate is the mean of all
    branches and ``steps`` is not read. V is the predicted ``variance``: "learned" for every step
    and channel from ``initial_variance``, "fixed" at no less than ``variance_floor``, or 1 ("l2").
    :math:`\sigma^2` is the variance of the estimates in the "batch" or a "unit"; it is a measure,
    not a target, so no gradient passes it. With "fixed" take "unit": estimates shrink as they are
    regressed, and in units of their variance the same error then costs more and more.

    ``guidance`` is :math:`\lambda`, for the layer of the teacher that its classifier reads; it has
    the term's weight too, and so its warm-up, for which recipes of 240 epochs take 20.

    Raises ValueError for layers that cannot be compared, more steps than levels, and guidance where
    the teacher's classifier reads none of the layers.

    Source: Yao and others 2024 (KDiffusion), AAAI 38(15), equations 1 to 10. Only a poster is
    public: the readings, the learned variance with the posterior's noise in it, the expectation in
    place of samples and all defaults are a reconstruction.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        probe: Probe,
        *,
        variant: Variant = "x0",
        variance: Variance = "learned",
        order: Order = "shuffle",
        steps: int = 8,
        schedule: NoiseSchedule = "cosine",
        levels: int = 1000,
        student_variance: StudentVariance = "batch",
        initial_variance: float = 1.0,
        variance_floor: float = 0.01,
        guidance: float = 0.0,
    ) -> None:
        super().__init__()
        reading: Reading = "x0" if variant == "average" else variant
        num_steps = 1 if variant == "average" else steps
        self.walk = Walk(reading, reverse_steps(schedule, num_steps, num_levels=levels))
        bridges = [_bridge(probe, here, there) for here, there in layers.items()]
        self.bridges = nn.ModuleList(bridges)
        self.assignments = nn.ModuleList(
            Assignment(num_steps, bridge.num_branches, order) for bridge in bridges
        )
        self.variances = nn.ModuleList(
            PredictedVariance(
                variance, num_steps, bridge.width, initial=initial_variance, floor=variance_floor
            )
            for bridge in bridges
        )
        self._layers, self._student_variance = dict(layers), student_variance
        self._guidance = guidance
        taught = present(probe.batch.teacher)
        self._guided = guided_layer(taught, layers.values()) if guidance else None

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        taught = present(teacher)
        total = batch.image.new_zeros(())
        parts = zip(self.bridges, self.assignments, self.variances, strict=True)
        for (here, there), (bridge, *of_steps) in zip(self._layers.items(), parts, strict=True):
            bridged = bridge(student.features[here], taught.features[there])
            total = total + self._likelihood(bridged, *of_steps, epoch=batch.epoch)
            if there == self._guided:
                total = total + self._guidance * target_guidance(bridged, taught.classifier)
        return total

    def _likelihood(
        self, bridged: Bridged, assignment: nn.Module, variance: nn.Module, *, epoch: float
    ) -> Tensor:
        error, spread = self.walk(assignment(bridged.estimates, epoch), bridged.clean)
        # without its graph: estimates that only shrink must not gain by it
        measured = bridged.variance.detach().clamp(min=_SMALLEST)
        if self._student_variance == "unit":
            measured = torch.ones_like(measured)
        noisy_error = error + spread.noise[:, None] * measured
        return gaussian_nll(noisy_error, variance(spread, measured)).mean()


def _bridge(probe: Probe, here: str, there: str) -> Bridge:
    student = feature_of("student", probe.student, here)
    teacher = feature_of("teacher", present(probe.batch.teacher), there)
    try:
        return Bridge(student.shape, teacher.shape)
    except ValueError as error:
        raise ValueError(f"layers {here!r}: {there!r}: {error}") from None
