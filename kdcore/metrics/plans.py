"""Exact plans of transport between uniform weights, solved on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# up to here scipy's assignment takes no longer than POT's network simplex
LARGEST_ASSIGNMENT = 256


class Plan(NamedTuple):
    """The entries of a plan that are not zero: at most n + m - 1 of n m.

    ``one_each`` says that the rows are 0, 1, ..., n - 1, so that nothing has to be gathered.
    """

    row: Int[Tensor, " s"]
    column: Int[Tensor, " s"]
    mass: Float[Tensor, " s"]
    one_each: bool = False


def transport_plan(cost: Float[Tensor, "n m"]) -> Plan:
    r"""An exact plan between uniform weights.

    .. math:: \min_{\gamma \ge 0} \langle \gamma, C \rangle, \quad
        \gamma 1 = 1/n, \quad \gamma^\top 1 = 1/m

    No gradient passes through the plan; it is solved on the CPU in float64, as an assignment where
    n = m <= 256 and by POT's network simplex elsewhere, and comes back to the cost's device and
    type.

    Raises ValueError for a cost that is not finite, on which the solver would give NaN.
    """
    return _solved(_on_cpu(cost), cost)


def class_transport_plan(
    cost: Float[Tensor, "n m"],
    student_label: Int[Tensor, " n"],
    teacher_label: Int[Tensor, " m"],
) -> Plan:
    """The exact plans of all classes that both samples have, each of total mass 1, as one.

    One assignment with all other pairs forbidden where every class is as frequent in both samples,
    as with one minibatch through two networks; POT class by class elsewhere.

    Raises ValueError for a cost that is not finite.
    """
    matrix = _on_cpu(cost)
    here = student_label.cpu()
    there = here if teacher_label is student_label else teacher_label.cpu()
    if _as_frequent(here, there) and len(here) <= LARGEST_ASSIGNMENT:
        forbidden = here[:, None] != there
        plan = _assignment(matrix.masked_fill_(forbidden, torch.inf), cost)
        share = (len(here) - forbidden.sum(dim=1)).to(cost).reciprocal()
        return plan._replace(mass=share)
    parts = [
        _solved_block(matrix, here == label, there == label, cost)
        for label in torch.unique(here)
        if bool((there == label).any())
    ]
    if not parts:
        nothing = here.new_empty(0, device=cost.device)
        return Plan(nothing, nothing, cost.new_empty(0))
    row, column, mass, _ = zip(*parts, strict=True)
    return Plan(torch.cat(row), torch.cat(column), torch.cat(mass))


def _on_cpu(cost: Tensor) -> Tensor:
    matrix = cost.detach().to("cpu", torch.float64, copy=True).contiguous()
    if not bool(matrix.sum().isfinite()):
        raise ValueError("the cost between student and teacher is not finite: a feature overflowed")
    return matrix


def _solved(matrix: Tensor, like: Tensor) -> Plan:
    n, m = matrix.shape
    if n == m and n <= LARGEST_ASSIGNMENT:
        return _assignment(matrix, like)
    # POT imports every array library that it finds, 1.5 s: paid by who transports, not at import
    from ot import emd

    plan = torch.from_numpy(emd([], [], matrix.numpy(), numItermax=10_000_000))
    row, column = plan.nonzero(as_tuple=True)
    return Plan(row.to(like.device), column.to(like.device), plan[row, column].to(like))


def _assignment(matrix: Tensor, like: Tensor) -> Plan:
    from scipy.optimize import linear_sum_assignment

    n = len(matrix)
    _, column = linear_sum_assignment(matrix.numpy())
    row = torch.arange(n, device=like.device)
    mass = like.new_full((n,), 1 / n)
    return Plan(row, torch.from_numpy(column).to(like.device), mass, one_each=True)


def _solved_block(
    matrix: Tensor, rows: Bool[Tensor, " n"], columns: Bool[Tensor, " m"], like: Tensor
) -> Plan:
    here, there = (mask.nonzero().squeeze(1) for mask in (rows, columns))
    plan = _solved(matrix[here][:, there].contiguous(), like)
    return Plan(here.to(like.device)[plan.row], there.to(like.device)[plan.column], plan.mass)


def _as_frequent(here: Tensor, there: Tensor) -> bool:
    if here is there:
        return True
    return here.shape == there.shape and bool((here.sort().values == there.sort().values).all())
