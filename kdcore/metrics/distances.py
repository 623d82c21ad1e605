"""All distances between the rows of two samples."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def squared_distances(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]
) -> Float[Tensor, "n m"]:
    r"""All squared distances, by one matrix product.

    .. math:: \|x_i\|^2 + \|y_j\|^2 - 2 \langle x_i, y_j \rangle

    Ten times faster than by differences, but digits that two rows have in common cancel: give rows
    about a common centre, in float64 where small distances count.
    """
    norms = _squared_norms(first, second)
    return torch.addmm(norms, first, second.mT, alpha=-2).clamp(min=0)


def distances(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    r"""All distances, with slope 0 where they are 0.

    .. math:: \| x_i - y_j \|

    By a product in float64, where what may be rounding is taken for 0: equal rows are at distance
    0, and so are rows that differ by less than about 1e-7 of their length.
    """
    here, there = first.double(), second.double()
    centre = there.mean(dim=0)
    here, there = here - centre, there - centre
    norms = _squared_norms(here, there)
    squared = torch.addmm(norms, here, there.mT, alpha=-2)
    # an inner product of length d is known to d eps times the norms: Higham 2002, section 3.1
    apart = squared > here.shape[1] * torch.finfo(here.dtype).eps * norms.detach()
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0).to(first)


def _squared_norms(first: Tensor, second: Tensor) -> Tensor:
    return first.square().sum(dim=1)[:, None] + second.square().sum(dim=1)
