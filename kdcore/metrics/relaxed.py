"""Transport that gives something up: directions, or the common space."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_same_width
from kdcore.metrics.distances import distances


def random_directions(
    width: int, num: int, *, seed: int, like: Tensor
) -> Float[Tensor, "{width} {num}"]:
    """Unit vectors as columns, uniform on the sphere; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(width, num, generator=generator, dtype=torch.float64)
    unit: Tensor = normal / torch.linalg.vector_norm(normal, dim=0)
    return unit.to(like)


def sliced_wasserstein(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    directions: Float[Tensor, "d l"],
) -> Float[Tensor, ""]:
    r"""Mean squared 2-Wasserstein distance of the projections on unit directions.

    .. math:: \frac1L \sum_l W_2^2\big( \theta_l^\top S, \theta_l^\top T \big)

    On a line the plan is sorting; between different numbers the quantile functions are compared on
    their common steps. About 1/d of the full distance.

    Source: Bonneel et al. 2015, Sliced and Radon Wasserstein barycenters of measures.
    """
    check_same_width(student, teacher)
    here = (student @ directions).sort(dim=0).values
    there = (teacher @ directions).sort(dim=0).values
    n, m = len(here), len(there)
    if n == m:
        return (here - there).square().mean()
    ends = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]))
    lengths = ends.diff(prepend=ends.new_zeros(1))
    row, column = ((ends - 1) // m).to(here.device), ((ends - 1) // n).to(here.device)
    mass = lengths.to(here) / (n * m)
    value: Tensor = mass @ (here[row] - there[column]).square().mean(dim=1)
    return value


def gromov_wasserstein(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "m e"], *, paired: bool = False
) -> Float[Tensor, ""]:
    r"""How differently two samples of any two widths are spread, by their inner distances.

    .. math:: \min_{\gamma \in \Gamma(1/n, 1/m)} \sum_{ijkl} \gamma_{ij} \gamma_{kl}
        \big( \|s_i - s_k\| - \|t_j - t_l\| \big)^2

    Blind to rotations and translations of either. The problem is not convex: POT finds a local
    minimum by conditional gradients, and the gradient holds it fixed. It starts from the product
    plan or, where row i of both is of one picture (``paired``), from the plan that keeps the pairs.
    The value is then at most the pairs' mean squared difference of distances; of 128 rows and their
    slightly noisy rotation it is that, 2e-4, where from the product plan it is 2e-2.

    Source: Peyre, Cuturi & Solomon 2016, Gromov-Wasserstein averaging of kernel and distance
    matrices, solved by POT.
    """
    from ot import unif
    from ot.gromov import gromov_wasserstein as solve

    here, there = distances(student, student), distances(teacher, teacher)
    n, m = len(here), len(there)
    inner = [matrix.detach().to("cpu", torch.float64).numpy() for matrix in (here, there)]
    start = np.eye(n) / n if paired else None
    found = solve(*inner, unif(n), unif(m), "square_loss", tol_rel=1e-12, G0=start)
    plan = torch.from_numpy(found).to(here)
    crossed = (here @ plan @ there * plan).sum()
    return here.square().mean() + there.square().mean() - 2 * crossed
