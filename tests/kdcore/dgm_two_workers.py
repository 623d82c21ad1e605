"""One of two gloo workers: a distiller's gradient under DDP beside that of one process.

Usage: python dgm_two_workers.py RANK FOLDER, as ``gloo.py`` calls it. What is measured of a case is
the loss and each parameter's gradient. Both have the same rows, from one run of the teacher of
which each worker takes half.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdcore.dgm.columns import from_columns, layout_of, to_columns
from kdcore.dgm.distiller import DGMDistiller
from kdcore.dgm.models.helmholtz import helmholtz_generator
from kdcore.dgm.models.ladder import Ladder, LadderGenerator
from kdcore.dgm.models.vrnn import VRNNGenerator
from kdcore.dgm.objective import PUBLISHED
from kdcore.dgm.trace import Trace
from tests.gloo import NUM_WORKERS, joined, mean_over_workers

NUM_ROWS = 6


def models(name: str, width: int) -> nn.Module:
    if name == "vrnn":
        return VRNNGenerator(length=3, hidden=width, state=width, latent=4).double()
    if name == "helmholtz":
        return helmholtz_generator(width).double()
    ladder = LadderGenerator(Ladder(width, 8, (4, 2, 1), image_channels=1)).double()
    return ladder.eval()  # BatchNorm's moments are each worker's own


def distillers() -> dict[str, DGMDistiller]:
    return {
        name: DGMDistiller(models(name, 4), models(name, 2), objective).eval()
        for name, objective in PUBLISHED.items()
    }


def half(trace: Trace, rank: int) -> Trace:
    """The worker's rows of a run, with everything that was drawn."""
    share = NUM_ROWS // NUM_WORKERS
    rows = slice(rank * share, (rank + 1) * share)
    columns = {name: column[rows] for name, column in to_columns(trace).items()}
    return from_columns(columns, layout_of(trace))


def measure(step: nn.Module, trace: Trace) -> dict[str, Tensor]:
    result = step(trace.num_rows, teacher_trace=trace)
    result.loss.backward()
    gradients = {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in step.named_parameters()
        if parameter.requires_grad
    }
    return {"loss": result.loss.detach().clone(), **gradients}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = distillers()
    traces = {name: step.run_teacher(NUM_ROWS) for name, step in steps.items()}
    measured = {
        name: {"one": measure(copy.deepcopy(step), traces[name])} for name, step in steps.items()
    }
    with joined(rank, folder, measured):
        for name, step in steps.items():
            two = measure(DistributedDataParallel(step), half(traces[name], rank))
            two["loss"] = mean_over_workers(two["loss"])
            measured[name]["two"] = two


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
