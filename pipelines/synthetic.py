"""The training batches of a run without data, and what is told of them beside its accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kdcore.datafree.batches import SyntheticBatches
from kdcore.datafree.images import Normalisation
from kdcore.datafree.selection import agreement
from kdcore.datafree.synthesis import Synthesizer
from kdcore.rows import num_workers, sum_over_workers
from kdcore.taps import Tapped
from pipelines.config import RunConfig
from pipelines.methods import AGREEMENT, SyntheticConfig
from pipelines.samples import epoch_grid, grid, png, put

SAMPLES = 10  # grids of pictures in a run, unless it says otherwise
HELD_OUT = 8  # of so many pictures one is kept to judge students by, where that is asked for


def synthetic_batches(
    run: RunConfig, student: Tapped, teacher: Tapped, shape: Sequence[int]
) -> SyntheticBatches:
    """The batches of a run's method; of the data it is told the shape (C, H, W) and no picture.

    Raises ValueError for a teacher that the method has no use for, with the methods that have.
    """
    config = method_of(run)
    plan = config.plan_of(run.batch_size)
    made = Synthesizer(
        teacher,
        plan,
        shape=shape,
        normalisation=Normalisation(run.data.mean, run.data.std),
        students=[student],
        seed=run.seed,
    )
    judged = config.select == "agreement"
    held_out = max(1, plan.schedule.batch_size // HELD_OUT) if judged else 0
    return SyntheticBatches(made, label=taught_by(run), held_out=held_out)


def method_of(run: RunConfig) -> SyntheticConfig:
    """How its pictures are made; ValueError for a run of real ones."""
    if run.synthetic is None:
        raise ValueError(f"run {run.name!r} has real pictures: it names no `synthetic` method")
    return run.synthetic


def taught_by(run: RunConfig) -> str:
    """The label of the teacher of which the pictures are made."""
    return method_of(run).teacher or next(iter(run.teachers))


def synthetic_metrics(
    run: RunConfig, batches: SyntheticBatches, student: Tapped
) -> dict[str, float]:
    """Of an epoch: the method's losses, its pictures' classes and statistics, the agreement."""
    metrics = {f"synthetic/{name}": value for name, value in batches.metrics().items()}
    if method_of(run).select == "agreement":
        share = agreement(student, batches.held_out_batches())
        own = torch.tensor(share, dtype=torch.float64, device=batches.synthesizer.like.device)
        metrics[AGREEMENT] = float(sum_over_workers(own)) / num_workers()
    return metrics


def sample_of(run: RunConfig, epoch: int) -> Path:
    """Where some pictures of an epoch are drawn, if they are."""
    return epoch_grid(run.folder, epoch)


def draw_sample(run: RunConfig, batches: SyntheticBatches, epoch: int) -> None:
    """Draw the last pictures of an epoch, if it is one of those whose pictures are drawn."""
    every = method_of(run).samples_every or -(-run.epochs // SAMPLES)
    last = batches.rounds.last
    if last is None or epoch % every:
        return
    stored = batches.synthesizer.normalisation.stored(last.image)
    path = sample_of(run, epoch)
    path.parent.mkdir(parents=True, exist_ok=True)
    put(path, png(grid(stored.cpu().numpy())))
