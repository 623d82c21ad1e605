"""What rounds of synthesis measure: the losses of their pictures, and what the teacher says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from kdcore.datafree.observation import Observation
from kdcore.datafree.predictions import class_shares
from kdcore.datafree.statistics import statistics_distance
from kdcore.datafree.synthesis import Round
from kdcore.rows import gather_rows, num_workers, sum_over_workers


@dataclass
class Rounds:
    """Means over rounds; of pictures only the last round's are kept."""

    count: int = 0
    sums: Counter[str] = field(default_factory=Counter)
    last: Round | None = None

    def add(self, made: Round) -> None:
        """Take up a round: its first and last loss, and the priors in its last step."""
        self.count += 1
        self.last = made
        if made.losses:
            self.sums.update({"loss_first": made.losses[0], "loss_last": made.losses[-1]})
        self.sums.update({f"part/{name}": value for name, value in made.parts.items()})

    @property
    def metrics(self) -> dict[str, float]:
        """The mean of each value, over workers too; a prior that began late counts as 0 before."""
        if self.last is None:
            return {}
        device = self.last.image.device
        own = torch.tensor(list(self.sums.values()), dtype=torch.float64, device=device)
        means = sum_over_workers(own) / (num_workers() * self.count)
        return dict(zip(self.sums, means.tolist(), strict=True))


def picture_metrics(said: Observation) -> dict[str, float]:
    """Of pictures of all workers: each class's share, and how far their statistics are off.

    ``share/K`` is how often the teacher chooses class K, ``statistics`` the distance from what its
    BatchNorms keep, where it has any.
    """
    shares = class_shares(gather_rows(said.outputs.logits)).tolist()
    metrics = {f"share/{number}": share for number, share in enumerate(shares)}
    if said.inputs:
        metrics["statistics"] = float(statistics_distance(said.moments, said.running))
    return metrics
