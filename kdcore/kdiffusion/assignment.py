"""Which branch serves which step: a fixed rule for any two counts, and the shuffle."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Order = Literal["shuffle", "strict"]

# SplitMix64: the increment and the two factors of its finaliser, as signed numbers
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def shares(num_steps: int, num_branches: int) -> Float[Tensor, "steps branches"]:
    r"""The share that each branch has in the estimate of each step; rows sum to 1.

    .. math:: A_{ji} = m \, \big| [\tfrac jm, \tfrac{j+1}m) \cap [\tfrac ib, \tfrac{i+1}b) \big|

    The m steps and the b branches divide one interval, each into equal parts, and meet where these
    overlap. With as many branches as steps, each serves one; with fewer, a branch serves
    consecutive steps; with more, a step takes the mean of consecutive branches; where neither
    count divides the other, shares at the edges are fractions. Every branch has the same total
    share, m / b, and a single step takes the mean of all.
    """
    m, b = num_steps, num_branches
    step, branch = torch.arange(m)[:, None], torch.arange(b)
    first = torch.maximum(step * b, branch * m)
    last = torch.minimum((step + 1) * b, (branch + 1) * m)
    return (last - first).clamp(min=0).double() / b


def shuffled(count: int, seed: Int[Tensor, ""], epoch: float) -> Int[Tensor, " count"]:
    """The numbers 0 to count - 1 in an order drawn from the seed and the moment of training.

    A function, not a state: all workers draw the same order, and a resumed run draws what the
    undisturbed one would have. Integer operations on the seed's device, so that nothing waits for
    the CPU and the compiler sees one graph.

    Source of the words: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators",
    SplitMix64.
    """
    moment = torch.full_like(seed, epoch, dtype=torch.float64).view(torch.int64)
    start = _mixed(_mixed(seed + _INCREMENT) ^ moment)
    words = _mixed(start + _INCREMENT * torch.arange(1, count + 1, device=seed.device))
    return torch.argsort(words)


class Assignment(nn.Module):
    """From the estimates of the branches to those of the steps, for one layer.

    Shuffled, all branches are trained alike, so that their mean is the natural combination; in
    strict order branch i always serves the same steps, and the first learn next to nothing.

    Source: Yao and others 2024, "shuffle sampling", equation 10, drawn for each batch.
    """

    seed: Tensor
    _shares: Tensor

    def __init__(self, num_steps: int, num_branches: int, order: Order) -> None:
        super().__init__()
        self._order = order
        self.register_buffer("seed", torch.randint(1 << 62, ()))
        self.register_buffer("_shares", shares(num_steps, num_branches), persistent=False)

    def forward(
        self, estimates: Float[Tensor, "branches b c p"], epoch: float
    ) -> Float[Tensor, "m b c p"]:
        assigned = self._shares.to(estimates)
        if self._order == "shuffle":
            # branch i stands where branch number order[i] does in strict order
            assigned = assigned[:, shuffled(len(estimates), self.seed, epoch)]
        return torch.einsum("ji,ibcp->jbcp", assigned, estimates)


def _mixed(word: Int[Tensor, "*k"]) -> Int[Tensor, "*k"]:
    # int64 wraps modulo 2^64; the masks undo the sign that the shifts drag along
    word = (word ^ ((word >> 30) & ((1 << 34) - 1))) * _FACTORS[0]
    word = (word ^ ((word >> 27) & ((1 << 37) - 1))) * _FACTORS[1]
    return word ^ ((word >> 31) & ((1 << 33) - 1))
