"""What is trained in each mode: a batch of rows in, the loss out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdcore.dgm.comparison import Distilled
from kdcore.dgm.continual import ContinualStep
from kdcore.dgm.coupling import NoiseMap, first_dimensions
from kdcore.dgm.distiller import DGMDistiller
from kdcore.dgm.row_noise import RowNoise
from kdcore.dgm.trace import Trace
from kdcore.dgm.variational import (
    Inferred,
    NegativeElbo,
    Variational,
    WakeSleep,
    negative_elbo,
)
from kdcore.schedules import Warmup
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.models import Model, generator_weights
from pipelines.generative.networks import LadderConfig
from pipelines.generative.observations import Tensors


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Some rows of an epoch: the noise that is theirs, and what is known of them."""

    noise: RowNoise
    targets: Tensors  # none where there is no data
    inputs: Tensors
    epoch: float = 0.0
    teacher: Trace | None = None  # its run on these rows, where that is kept

    @property
    def num_rows(self) -> int:
        return len(self.noise.row)


@dataclass(frozen=True, slots=True)
class Learned:
    """The loss with its graph, and its parts without."""

    loss: Tensor
    parts: Mapping[str, Tensor]


class GenerativeStep(nn.Module, ABC):
    """A mode of training: what it trains, of which ``generator`` is what is made."""

    trained: nn.Module
    generator: nn.Module

    @abstractmethod
    def forward(self, batch: RowBatch) -> Learned:
        """The loss of a batch."""

    @abstractmethod
    def judged(self, batch: RowBatch) -> Tensor:
        """The mean over held-out rows of what chooses the epoch."""

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """The weights by which ``load_model`` has it again."""


class ElboStep(GenerativeStep):
    """By the evidence lower bound, whose divergence is warmed up."""

    def __init__(self, model: Variational, *, warmup: float) -> None:
        super().__init__()
        self.model, self.trained, self.generator = model, model, model.generator
        self._objective = NegativeElbo(model, kl_weight=Warmup(1.0, warmup) if warmup else 1.0)

    def forward(self, batch: RowBatch) -> Learned:
        found = self._objective(
            batch.targets, inputs=batch.inputs, epoch=batch.epoch, noise=batch.noise
        )
        divergences = {f"kl_{group}": value for group, value in found.kl.items()}
        return Learned(found.loss, {"reconstruction": found.reconstruction, **divergences})

    def judged(self, batch: RowBatch) -> Tensor:
        return -negative_elbo(_inferred(self.model, batch)).loss

    def kept(self) -> dict[str, Tensor]:
        return self.model.state_dict()


class WakeSleepStep(GenerativeStep):
    """By wake and sleep, and judged by the evidence lower bound that its recognition gives."""

    def __init__(self, model: WakeSleep) -> None:
        super().__init__()
        self.model, self.trained, self.generator = model, model, model.generator

    def forward(self, batch: RowBatch) -> Learned:
        rows = batch.num_rows
        wake = self.model.wake(batch.targets, rows, noise=batch.noise)
        sleep = self.model.sleep(rows, noise=batch.noise)
        return Learned(wake + sleep, {"wake": wake.detach(), "sleep": sleep.detach()})

    def judged(self, batch: RowBatch) -> Tensor:
        recognised = Trace(batch.num_rows, inputs=batch.targets, generator=batch.noise)
        self.model.recognition(recognised)
        joint = Trace(batch.num_rows, values={**recognised.values("latent"), **dict(batch.targets)})
        self.model.generator(joint)
        return (joint.log_prob() - recognised.log_prob(["latent"])).mean()

    def kept(self) -> dict[str, Tensor]:
        return self.model.state_dict()


class DistilledStep(GenerativeStep):
    """From a teacher's noise alone."""

    def __init__(self, distiller: DGMDistiller) -> None:
        super().__init__()
        self.distiller = distiller
        self.trained = self.generator = distiller.student

    def forward(self, batch: RowBatch) -> Learned:
        found = self.compared(batch)
        latent = {f"latent_{group}": value for group, value in found.latent.items()}
        return Learned(
            found.loss, {"target": torch.stack([*found.target.values()]).sum(), **latent}
        )

    def judged(self, batch: RowBatch) -> Tensor:
        return self.compared(batch).loss

    def compared(self, batch: RowBatch) -> Distilled:
        """Both runs and what they cost."""
        found: Distilled = self.distiller(
            batch.num_rows,
            inputs=batch.inputs,
            teacher_trace=batch.teacher,
            generator=batch.noise,
        )
        return found

    def kept(self) -> dict[str, Tensor]:
        return generator_weights(self.generator)


class GoesOnStep(GenerativeStep):
    """From data of a new condition, while an old one is held on to."""

    def __init__(self, model: Variational, objective: ContinualStep) -> None:
        super().__init__()
        self.model, self.trained, self.generator = model, model, model.generator
        self._objective = objective

    def forward(self, batch: RowBatch) -> Learned:
        return Learned(self._objective(batch.targets["y"], noise=batch.noise), {})

    def judged(self, batch: RowBatch) -> Tensor:
        loss: Tensor = self._objective(batch.targets["y"], noise=batch.noise)
        return loss

    def bound(self, batch: RowBatch) -> Tensor:
        """The evidence lower bound of rows of any condition."""
        return -negative_elbo(_inferred(self.model, batch)).loss

    def kept(self) -> dict[str, Tensor]:
        return self.model.state_dict()


def build_step(run: GenerativeConfig, student: Model, teacher: Model | None) -> GenerativeStep:
    """The step of a run's mode, for a student whose weights are random.

    Raises ValueError where teacher and student do not fit.
    """
    if run.mode == "scratch":
        if isinstance(student, WakeSleep):
            return WakeSleepStep(student)
        return ElboStep(student, warmup=run.scratch.warmup * run.epochs)
    assert teacher is not None
    if run.mode == "continual":
        return _going_on(run, student, teacher)
    return DistilledStep(
        DGMDistiller(
            teacher.generator,
            student.generator,
            run.distil.objective,
            mode=run.mode,
            gradient=run.distil.gradient,
            match=run.distil.match,
            noise_maps=noise_maps(run),
            num_noise=run.distil.noise,
        )
    )


def noise_maps(run: GenerativeConfig) -> dict[str, NoiseMap]:
    """By the student's latent, what it takes of the teacher's noise."""
    return {name: first_dimensions(held.first) for name, held in run.distil.noise_map.items()}


def _going_on(run: GenerativeConfig, student: Model, teacher: Model) -> GenerativeStep:
    assert isinstance(student, Variational)
    assert isinstance(run.model, LadderConfig)
    student.load_state_dict(teacher.state_dict())
    objective = ContinualStep(
        student,
        run.distil.objective,
        num_conditions=len(run.model.conditions),
        old=run.continual.old,
        new=run.continual.new,
        new_share=run.continual.share,
        old_weight=run.continual.old_weight,
        replay=run.continual.replay,
    )
    return GoesOnStep(student, objective)


def _inferred(model: Variational, batch: RowBatch) -> Inferred:
    return model.infer(batch.targets, inputs=batch.inputs, noise=batch.noise)
