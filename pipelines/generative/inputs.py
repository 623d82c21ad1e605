"""What a run of a graphical model trains on: its teacher's weights, and data where there is any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.archives import Part
from pipelines.generative.batches import Batches, judge_of
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.loop import fit
from pipelines.generative.models import Model, build_model, load_model
from pipelines.generative.observations import Observations, observations
from pipelines.generative.steps import GenerativeStep, build_step
from pipelines.generative.traces import Traces
from pipelines.loop import Progress, Report, pick_device


@dataclass(frozen=True)
class GenerativeInputs:
    """A teacher's weights, if the run has one, and its runs, if they are kept.

    Data are read where they are used.
    """

    weights: Path | None
    data: tuple[str, str, str] | None = None  # name, digest and source of what is learned from
    fingerprint: str = ""  # of the cache of the teacher's runs
    traces: Traces | None = None  # what stands in it

    def fit(
        self,
        run: GenerativeConfig,
        *,
        report: Report,
        resume: Path | None = None,
        rank: int = 0,
    ) -> Progress:
        """Train the run in this process, or this worker's part of it.

        Raises ValueError for a run that hears a cache which was not made ready.
        """
        if run.hears_cache and self.traces is None:
            raise ValueError(
                "the run hears the cache of its teacher, which was not made ready; of a sweep the "
                "base must hear it"
            )
        device = pick_device()
        step, teacher = step_of(run, self.weights)
        evidence = evidence_of(run)
        batches = Batches(
            run,
            evidence if run.learns_from_data else None,
            rank,
            device,
            self.traces if run.hears_cache else None,
        )
        judge = judge_of(run, teacher, evidence, device)
        return fit(run, step, batches, judge, report=report, resume=resume, device=device)


def evidence_of(run: GenerativeConfig, part: Part = "train") -> Observations | None:
    """The data of a run as its model sees them; None where none are read."""
    if run.evidence is None or not run.compares_data:
        return None
    return observations(run.model, run.evidence, part)


def step_of(
    run: GenerativeConfig, weights: Path | None, *, blank: bool = False
) -> tuple[GenerativeStep, Model | None]:
    """The run's step, initialised from its seed, and its teacher with its weights.

    ``blank`` builds a teacher without them, where only shapes matter.
    """
    teacher = None
    if run.teacher is not None and blank:
        teacher = build_model(run.teacher.network).eval()
    elif run.teacher is not None and weights is not None:
        teacher = load_model(run.teacher.network, weights)
    torch.manual_seed(run.seed)
    return build_step(run, build_model(run.model), teacher), teacher
