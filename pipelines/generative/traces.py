"""Runs of a teacher that are kept: noise that is drawn once, for all students and all epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcore.dgm.columns import SiteLayout, from_columns
from kdcore.dgm.row_noise import RowNoise
from kdcore.dgm.trace import Trace
from pipelines.generative.models import Model
from pipelines.generative.networks import NetworkConfig
from pipelines.generative.samples import KEPT, conditions

SEED = 0  # of noise that belongs to no run


@dataclass(frozen=True)
class Traces:
    """The columns of ``kdcore.dgm.columns`` in memory, and what they do not tell."""

    columns: Mapping[str, np.ndarray]
    layout: Sequence[SiteLayout]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, rows: np.ndarray, device: torch.device) -> Trace:
        """The teacher's run of some rows."""
        held = {
            name: torch.from_numpy(column[rows]).to(device) for name, column in self.columns.items()
        }
        return from_columns(held, self.layout)


def run_of_rows(network: NetworkConfig, teacher: Model, rows: Tensor) -> Trace:
    """The teacher's run of some rows, whose noise is a function of their numbers alone."""
    trace = Trace(
        len(rows),
        inputs=conditions(network, rows),
        generator=RowNoise(rows, epoch=0, seed=SEED, use=KEPT),
    )
    with torch.no_grad():
        teacher.generator(trace)
    return trace
