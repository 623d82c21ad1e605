"""What rounds of synthesis measure: the losses of their pictures, and what the teacher says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kdcore.datafree.observation import observe
from kdcore.datafree.predictions import class_shares
from kdcore.datafree.statistics import Moments, statistics_distance
from kdcore.datafree.synthesis import Round
from kdcore.rows import gather_rows, num_workers, rank, sum_over_workers
from kdcore.taps import Tapped


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

    def state_dict(self) -> dict[str, Any]:
        """The sums of every worker, but no pictures; all workers must ask at once."""
        device = None if self.last is None else self.last.image.device
        own = torch.tensor([*self.sums.values()], dtype=torch.float64, device=device)
        return {"count": self.count, "names": [*self.sums], "sums": gather_rows(own[None])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = state["sums"][rank() if len(state["sums"]) > 1 else 0]
        self.count, self.last = state["count"], None
        self.sums = Counter(dict(zip(state["names"], own.tolist(), strict=True)))


@dataclass(frozen=True)
class Answers:
    """What a teacher says of pictures, and what its BatchNorms see of them and of the data."""

    logits: Float[Tensor, "n k"]
    moments: tuple[Moments, ...]  # of each BatchNorm's input, over the pictures of all workers
    running: tuple[Moments, ...]


@torch.no_grad()
def answers(teacher: Tapped, parts: Iterable[Float[Tensor, "_ c h w"]]) -> Answers:
    """Of all pictures, though only one part's maps are held at a time: their sums are added."""
    logits: list[Tensor] = []
    sums: list[Tensor] = []
    running: tuple[Moments, ...] = ()
    for part in parts:
        said = observe(teacher, part)
        logits.append(said.outputs.logits)
        own = [_sums(maps) for maps in said.inputs]
        sums = [past + now for past, now in zip(sums, own, strict=True)] if sums else own
        running = said.running
    return Answers(torch.cat(logits), tuple(_moments(one) for one in sums), running)


def _sums(maps: Float[Tensor, "b c ..."]) -> Float64[Tensor, "3 c"]:
    """Of each channel the number of values, their sum and that of their squares."""
    values = maps.transpose(0, 1).flatten(1).double()
    count = torch.full_like(values[:, 0], values.shape[1])
    return torch.stack([count, values.sum(dim=1), values.square().sum(dim=1)])


def _moments(sums: Float64[Tensor, "3 c"]) -> Moments:
    count, total, squares = sum_over_workers(sums)
    mean = total / count
    return Moments(mean, squares / count - mean.square())


def picture_metrics(said: Answers) -> dict[str, float]:
    """Of pictures of all workers: each class's share, and how far their statistics are off.

    ``share/K`` is how often the teacher chooses class K, ``statistics`` the distance from what its
    BatchNorms keep, where it has any.
    """
    shares = class_shares(gather_rows(said.logits)).tolist()
    metrics = {f"share/{number}": share for number, share in enumerate(shares)}
    if said.moments:
        metrics["statistics"] = float(statistics_distance(said.moments, said.running))
    return metrics
