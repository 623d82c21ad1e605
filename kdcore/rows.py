"""Rows that losses compare with each other: those of all workers, and of unit length."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor


def num_workers() -> int:
    """The processes that train together: 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This one among them, from 0 on."""
    return dist.get_rank() if num_workers() > 1 else 0


def gather_rows(rows: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "rows ..."]:
    """The rows of every worker in rank order; without a process group, the rows themselves.

    Each worker must hold as many rows as every other. The gradient of a row is the sum of what all
    workers send it, so that a loss of the gathered rows, computed by every worker and averaged over
    workers by DDP, has the gradient of the same loss in one process.
    """
    if num_workers() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


def unit_rows(rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Each row divided by its length; a row of zeros as it is, with a gradient of its own size."""
    # not normalize(): its slope at zero is 1e12
    squared = rows.square().sum(dim=-1, keepdim=True)
    return rows / torch.where(squared > 0, squared, 1.0).sqrt()


def sum_over_workers(value: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
    """The sum of every worker's tensor, without a gradient; with one worker, the tensor itself."""
    if num_workers() == 1:
        return value
    total = value.detach().contiguous().clone()
    dist.all_reduce(total)
    return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(num_workers())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # all_reduce and a slice rather than reduce_scatter: gloo has only the former
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.num_rows :][: ctx.num_rows]
