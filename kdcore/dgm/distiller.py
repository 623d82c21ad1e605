"""The loss of a student model against its teacher, by one ordinary run of each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from kdcore.dgm.comparison import Distilled, compare
from kdcore.dgm.coupling import NoiseMap, student_name
from kdcore.dgm.families import Gradient
from kdcore.dgm.marginals import marginal_divergence
from kdcore.dgm.objective import Objective, group_of
from kdcore.dgm.row_noise import NoiseSource
from kdcore.dgm.trace import Trace

Mode = Literal["surrogate", "local", "marginalized"]

_NO_TENSORS: Mapping[str, Tensor] = MappingProxyType({})
_NO_MAPS: Mapping[str, NoiseMap] = MappingProxyType({})
_NO_MODULES: Mapping[str, nn.Module] = MappingProxyType({})


class DGMDistiller(nn.Module):
    r"""Teacher and student as one module for DDP to wrap; its output is the loss.

    .. math:: E_{\epsilon, x} \Big[ \sum_j d\big( p_T(y_j | y_{<j}, \epsilon, x),
        p_S(y_j | y_{<j}, \epsilon, x) \big)
        + \lambda \sum_i d\big( p_T(z_i | \epsilon_{<i}, x), p_S(z_i | \epsilon_{<i}, x) \big) \Big]

    "surrogate" is this: the student gets the teacher's noise and the teacher's sampled targets, and
    each latent is compared at the student's own parents. "local" gives it the teacher's latent
    values instead. "marginalized" compares exact marginals, for models small enough.

    Latents are paired by ``match`` (teacher: student, by variable or group; names without it);
    noise of the teacher that nobody wants is dropped, noise of the student's others is drawn anew.
    ``noise_maps``, by the student's variable or group, turn the teacher's noise into the student's.
    Latents of different shapes are not compared, with a warning, unless ``adapters`` has a module
    for the student's: then their means are, by squared distance.

    The teacher is frozen and stays in evaluation mode. Only what a student's run uses may ask for a
    gradient under DDP, so leave encoders out of it.

    Source: Chen et al. 2023, "Knowledge distillation for deep directed graphical models", CVPR,
    whose code leaves teachers in training mode and builds their graph.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        objective: Objective,
        *,
        mode: Mode = "surrogate",
        gradient: Gradient = "none",
        match: Mapping[str, str] | None = None,
        noise_maps: Mapping[str, NoiseMap] = _NO_MAPS,
        adapters: Mapping[str, nn.Module] = _NO_MODULES,
        num_noise: int = 1,
    ) -> None:
        super().__init__()
        if num_noise < 1:
            raise ValueError(f"a row needs at least one sample of noise, got {num_noise}")
        self.teacher = teacher.requires_grad_(False).eval()
        self.student = student
        self.adapters = nn.ModuleDict(adapters)
        self._objective, self._mode, self._gradient = objective, mode, gradient
        self._match, self._noise_maps, self._num_noise = match, dict(noise_maps), num_noise

    def train(self, mode: bool = True) -> DGMDistiller:
        super().train(mode)
        self.teacher.eval()  # the moments of its BatchNorm are not to move
        return self

    def forward(
        self,
        num_rows: int,
        *,
        inputs: Mapping[str, Tensor] = _NO_TENSORS,
        targets: Mapping[str, Tensor] = _NO_TENSORS,
        teacher_trace: Trace | None = None,
        generator: NoiseSource | None = None,
    ) -> Distilled:
        """The loss on ``num_rows`` rows, each with its ``num_noise`` samples of noise.

        ``targets`` from data take the place of the teacher's samples; ``teacher_trace`` that of its
        run, whose rows then are those of the student's.

        Raises ValueError for targets that differ in name, and for latents that local distillation
        cannot hand over.
        """
        if self._mode == "marginalized":
            return self._marginalized(num_rows, inputs, generator)
        if teacher_trace is None:
            teacher_trace = self.run_teacher(
                num_rows, inputs=inputs, targets=targets, generator=generator
            )
        student = self._run_student(teacher_trace, generator)
        return compare(
            teacher_trace,
            student,
            self._objective,
            match=self._match,
            adapters=self.adapters,
        )

    @torch.no_grad()
    def run_teacher(
        self,
        num_rows: int,
        *,
        inputs: Mapping[str, Tensor] = _NO_TENSORS,
        targets: Mapping[str, Tensor] = _NO_TENSORS,
        generator: NoiseSource | None = None,
    ) -> Trace:
        """One run of the teacher, ``num_noise`` times as long, without a graph."""
        trace = Trace(
            num_rows * self._num_noise,
            inputs=self._repeated(inputs),
            values=self._repeated(targets),
            generator=generator,
        )
        self.teacher(trace)
        return trace

    def _run_student(self, teacher: Trace, generator: NoiseSource | None) -> Trace:
        noise, values = {}, teacher.values("target")
        for name, site in teacher.of_kind("latent").items():
            own = student_name(self._match, name)
            if own is not None and self._mode == "local":
                values[own] = site.value
            elif own is not None and site.noise is not None:
                noise[own] = self._mapped(own, site.noise)
        run = Trace(
            teacher.num_rows,
            inputs=teacher.inputs,
            noise=noise,
            values=values,
            gradient=self._gradient,
            generator=generator,
        )
        self.student(run)
        return run

    def _mapped(self, name: str, noise: Tensor) -> Tensor:
        noise_map = self._noise_maps.get(name) or self._noise_maps.get(group_of(name))
        return noise if noise_map is None else noise_map(noise)

    def _repeated(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: v.repeat_interleave(self._num_noise, dim=0) for name, v in values.items()}

    def _marginalized(
        self, num_rows: int, inputs: Mapping[str, Tensor], generator: NoiseSource | None
    ) -> Distilled:
        loss = marginal_divergence(
            self._objective.target,
            self.teacher,
            self.student,
            num_rows,
            inputs=inputs,
            generator=generator,
        )
        return Distilled(loss, {"marginal": loss.detach()}, {})
