"""Random numbers of a synthesis: a function of the picture, of what has been drawn, and of a seed.

So what is invented does not depend on who invents it, nor on how many do, nor on an interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdcore import philox
from kdcore.rows import num_workers, rank


class Stream(IntEnum):
    """What numbers are drawn for; two uses of one stream would see the same numbers."""

    START = 0
    LATENT = 1
    NORMAL_TARGET = 2
    GAMMA = 3
    ROLL = 4
    CROP = 5
    FLIP = 6
    LOCAL_VIEW = 7
    MEMORY = 8
    WEIGHTS = 9
    LOCAL_FLIP = 10


@dataclass(frozen=True)
class Draw:
    """One occasion to draw numbers for some pictures: ``count`` tells it from every other."""

    row: Int[Tensor, " b"]  # of the batch of all workers
    count: int
    seed: int

    def uniform(self, shape: Sequence[int], stream: Stream) -> Float[Tensor, "b ..."]:
        """Float64 numbers in (0, 1), ``shape`` of them for each picture."""
        return philox.uniform(
            self.row, shape, epoch=float(self.count), stream=stream, seed=self.seed
        )

    def normal(self, shape: Sequence[int], stream: Stream) -> Float[Tensor, "b ..."]:
        """Float64 numbers of a standard normal distribution, ``shape`` of them for each picture."""
        return philox.normal(
            self.row, shape, epoch=float(self.count), stream=stream, seed=self.seed
        )

    def integers(self, shape: Sequence[int], below: int, stream: Stream) -> Int[Tensor, "b ..."]:
        """Whole numbers from 0 to ``below - 1``, ``shape`` of them for each picture."""
        return (self.uniform(shape, stream) * below).long()

    def shared(self) -> Draw:
        """The same occasion for the batch as a whole: one row, the same on every worker."""
        return replace(self, row=torch.zeros_like(self.row[:1]))

    def part(self, number: int, parts: int) -> Draw:
        """Every ``parts``-th picture from ``number`` on."""
        return replace(self, row=self.row[number::parts])


def rows_of_worker(count: int, device: torch.device) -> Int[Tensor, " b"]:
    """This worker's rows of a batch of ``count``, which is all of them where it is alone.

    Raises ValueError where the workers cannot have as many each.
    """
    workers = num_workers()
    if count % workers:
        raise ValueError(f"a batch of {count} pictures cannot be shared by {workers} workers alike")
    share = count // workers
    return torch.arange(rank() * share, (rank() + 1) * share, device=device)
