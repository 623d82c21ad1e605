"""Noise that belongs to rows, not to whoever draws it: two workers draw what one process would."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdcore import philox

NoiseLaw = Literal["normal", "uniform", "gumbel", "none"]
_BLOCK = 1024  # numbers of a row that are made at once: small draws would spend their time on calls


class RowNoise:
    """A source of noise whose numbers are a function of (row, epoch, seed, use) and their order.

    Where a run draws for k times as many rows, as of ``num_noise``, the k belong to one row. Runs
    that are given the same object, such as a teacher's and then its student's, draw on from it.
    ``use`` keeps apart what must not see the same numbers: training, and what is held out.
    """

    def __init__(self, row: Int[Tensor, " b"], *, epoch: int, seed: int, use: int = 0) -> None:
        self.row, self._epoch, self._seed = row, epoch, seed
        self._next_block = use << 16  # of 2^32 streams
        self._ready = torch.empty(len(row), 0, dtype=torch.float64, device=row.device)

    def draw(self, law: NoiseLaw, shape: Sequence[int], like: Tensor) -> Float[Tensor, ...]:
        """The next numbers of every row by that law, in the type of ``like``.

        Raises ValueError for a shape that does not begin with a multiple of the rows.
        """
        if not shape or shape[0] % len(self.row):
            raise ValueError(
                f"noise of {len(self.row)} rows was asked for in the shape {tuple(shape)}, which "
                "should begin with so many, or with a multiple"
            )
        numbers = self._take(math.prod(shape) // len(self.row)).reshape(tuple(shape))
        if law == "normal":
            numbers = torch.special.ndtri(numbers)
        elif law == "gumbel":
            numbers = -(-numbers.log()).log()
        return numbers.to(like)

    def _take(self, count: int) -> Float[Tensor, "b n"]:
        blocks = [self._ready]
        for _ in range(-(-max(0, count - self._ready.shape[1]) // _BLOCK)):
            blocks.append(
                philox.uniform(
                    self.row,
                    (_BLOCK,),
                    epoch=float(self._epoch),
                    stream=self._next_block,
                    seed=self._seed,
                )
            )
            self._next_block += 1
        ready = torch.cat(blocks, dim=1) if len(blocks) > 1 else self._ready
        self._ready = ready[:, count:]
        return ready[:, :count]


NoiseSource = torch.Generator | RowNoise
