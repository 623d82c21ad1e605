"""Exact plans of transport between uniform weights, solved on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.metrics.classes import Shared

# up to here one assignment over all classes takes no longer than one for each of them
LARGEST_OF_ALL_CLASSES = 256

NOT_FINITE = "the cost between student and teacher is not finite: a feature overflowed"


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

    No gradient passes through the plan; it is solved on the CPU in float64 and comes back to the
    cost's device and type. Where n = m it is an assignment, found in a half to a seventh of the
    time of POT's network simplex for features of 16 dimensions or more; POT solves the rest.

    Raises ValueError for a cost that is not finite, on which the solver would give NaN.
    """
    n, m = cost.shape
    if n == m:
        return _assignment(cost, cost.new_full((n,), 1 / n))
    # POT imports every array library that it finds, 1.5 s: paid by who transports, not at import
    from ot import emd

    matrix = _on_cpu(cost)
    if not bool(matrix.sum().isfinite()):
        raise ValueError(NOT_FINITE)
    plan = torch.from_numpy(emd([], [], matrix.numpy(), numItermax=10_000_000))
    row, column = plan.nonzero(as_tuple=True)
    return Plan(row.to(cost.device), column.to(cost.device), plan[row, column].to(cost))


def class_transport_plan(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    classes: Shared,
    weights: Float[Tensor, " c"],
    *,
    cost: Callable[[Tensor, Tensor], Tensor],
) -> Plan:
    """The exact plans within all classes that both samples have, as one.

    ``weights`` are the masses of the classes' plans, ``cost`` is that of some rows of the student
    with some of the teacher. One assignment with all other pairs forbidden where every class is as
    frequent in both samples, as with one minibatch through two networks; class by class where it
    is not, and where there are many rows.

    Raises ValueError for a cost that is not finite.
    """
    here, there = (count.tolist() for count in classes.counts)
    if here == there and len(student) <= LARGEST_OF_ALL_CLASSES:
        forbidden = classes.student[:, None] != classes.teacher
        shares = (weights / classes.counts[0]).index_select(0, classes.student)
        return _assignment(cost(student, teacher).masked_fill_(forbidden, torch.inf), shares)
    return _joined(
        [
            _class_plan(student, teacher, classes, label, weights, cost)
            for label in range(classes.num)
            if here[label] and there[label]
        ],
        nothing=Plan(classes.student[:0], classes.teacher[:0], weights[:0]),
    )


def _assignment(cost: Tensor, mass: Tensor) -> Plan:
    from scipy.optimize import linear_sum_assignment

    try:
        _, column = linear_sum_assignment(_on_cpu(cost).numpy())
    except ValueError:  # what scipy says of NaN, and of a row without a finite entry
        raise ValueError(NOT_FINITE) from None
    row = torch.arange(len(mass), device=mass.device)
    return Plan(row, torch.from_numpy(column).to(mass.device), mass, one_each=True)


def _on_cpu(cost: Tensor) -> Tensor:
    return cost.detach().to("cpu", torch.float64)


def _class_plan(
    student: Tensor,
    teacher: Tensor,
    classes: Shared,
    label: int,
    weights: Tensor,
    cost: Callable[[Tensor, Tensor], Tensor],
) -> Plan:
    rows = (classes.student == label).nonzero().squeeze(1)
    columns = (classes.teacher == label).nonzero().squeeze(1)
    plan = transport_plan(cost(student[rows], teacher[columns]))
    return Plan(rows[plan.row], columns[plan.column], weights[label] * plan.mass)


def _joined(plans: list[Plan], nothing: Plan) -> Plan:
    row, column, mass, _ = zip(nothing, *plans, strict=True)
    return Plan(torch.cat(row), torch.cat(column), torch.cat(mass))
