"""What is kept of earlier rounds: pictures for the student, features for the synthesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from kdcore.datafree.draws import Draw, Stream
from kdcore.datafree.images import Normalisation


@final
class Pool(nn.Module):
    """Pictures in 8 bits, those of all workers on every worker; beyond ``limit`` the oldest go.

    Source: the codes of CMI and FastDFKD, whose pool of PNG files is never emptied, and is decoded
    again for every batch.
    """

    stored: Tensor

    def __init__(self, shape: Sequence[int], *, limit: int | None, device: torch.device) -> None:
        super().__init__()
        self.limit = limit
        empty = torch.empty(0, *shape, dtype=torch.uint8, device=device)
        self.register_buffer("stored", empty)

    def __len__(self) -> int:
        return len(self.stored)

    def add(self, stored: Shaped[Tensor, "b c h w"]) -> None:
        """Add pictures of all workers."""
        held = torch.cat([self.stored, stored])
        self.stored = held if self.limit is None else held[-self.limit :]

    def draw(self, draw: Draw) -> Int[Tensor, " b"]:
        """A row of the pool for each picture that is asked for, with replacement.

        Raises RuntimeError where the pool is empty.
        """
        if not len(self):
            raise RuntimeError("the pool is empty: synthesise a round before drawing from it")
        return draw.integers((), len(self), Stream.MEMORY)

    def pictures(
        self, rows: Int[Tensor, " b"], normalisation: Normalisation, dtype: torch.dtype
    ) -> Float[Tensor, "b c h w"]:
        """Rows of the pool as a network takes them."""
        return normalisation.loaded(self.stored[rows], dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # its length is part of its state
        self.stored = torch.empty_like(state_dict[f"{prefix}stored"], device=self.stored.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@final
class FeatureBank(nn.Module):
    """The last ``size`` rows that were added, and random ones of them, the same for every worker.

    A full bank is never empty: the size is counted, not read off the place of the next row.
    """

    rows: Tensor
    count: Tensor
    random_state: Tensor

    def __init__(self, size: int, shape: Sequence[int], *, like: Tensor, seed: int) -> None:
        super().__init__()
        self.register_buffer("rows", like.new_zeros(size, *shape))
        self.register_buffer("count", torch.tensor(0))  # ever added
        state = torch.Generator().manual_seed(seed).get_state()
        self.register_buffer("random_state", state)

    def __len__(self) -> int:
        return min(int(self.count), len(self.rows))

    @torch.no_grad()
    def add(self, rows: Shaped[Tensor, "b ..."]) -> None:
        newest = rows[-len(self.rows) :]
        skipped = len(rows) - len(newest)
        place = int(self.count) + skipped + torch.arange(len(newest), device=self.rows.device)
        self.rows[place % len(self.rows)] = newest
        self.count += len(rows)

    def draw(self, num: int) -> Shaped[Tensor, "n ..."]:
        """Up to ``num`` different rows; none of an empty bank."""
        generator = torch.Generator()
        generator.set_state(self.random_state.cpu())
        chosen = torch.randperm(len(self), generator=generator)[:num]
        self.random_state.copy_(generator.get_state())
        return self.rows[chosen.to(self.rows.device)]
