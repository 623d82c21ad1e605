"""Optimal transport between two samples, solved by POT."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.checks import check_same_width


def transport_plan(
    cost: Float[Tensor, "n m"],
) -> tuple[Int[Tensor, " s"], Int[Tensor, " s"], Float[Tensor, " s"]]:
    """Rows, columns and masses of an exact plan between uniform weights.

    .. math:: \\min_{\\gamma \\ge 0} \\langle \\gamma, C \\rangle, \\quad
        \\gamma 1 = 1/n, \\quad \\gamma^\\top 1 = 1/m

    At most n + m - 1 entries are not zero, and only these are returned. No gradient passes through
    the plan; it is solved on the CPU in float64 and comes back to the cost's device and type.

    Raises ValueError for a cost that is not finite, on which the solver would give NaN.
    """
    # POT imports every array library that it finds, 1.5 s: paid by who transports, not at import
    from ot import emd

    matrix = cost.detach().to("cpu", torch.float64).contiguous()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the cost between student and teacher is not finite: a feature overflowed")
    plan = torch.from_numpy(emd([], [], matrix.numpy()))
    row, column = plan.nonzero(as_tuple=True)
    mass = plan[row, column].to(cost)
    return row.to(cost.device), column.to(cost.device), mass


def squared_wasserstein(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance between two samples of uniform weights.

    .. math:: W_2^2 = \min_{\gamma \in \Gamma(1/n, 1/m)} \sum_{ij} \gamma_{ij} \|s_i - t_j\|^2

    The gradient is that of the sum with the plan held fixed (envelope theorem); at a tie between
    plans it is a subgradient. The value is summed over the plan's own pairs, not taken from the
    cost matrix, whose entries lose digits to cancellation in float32.
    """
    check_same_width(student, teacher)
    with torch.no_grad():
        # about the teacher's mean, where float32 distances of rows far from zero keep their digits
        centre = teacher.mean(dim=0)
        cost = torch.cdist(student - centre, teacher - centre).square()
    row, column, mass = transport_plan(cost)
    return (mass * (student[row] - teacher[column]).square().sum(dim=1)).sum()
