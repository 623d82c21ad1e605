"""Optimal transport between two samples: the distances that exact plans give."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcore.checks import check_same_width
from kdcore.metrics.classes import class_sums
from kdcore.metrics.distances import squared_distances
from kdcore.metrics.plans import Plan, transport_plan


def squared_costs(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "m d"]
) -> Float[Tensor, "n m"]:
    """All squared distances by one matrix product, without gradient: to find a plan with.

    Taken about the teacher's mean, where float32 distances of rows far from zero keep their digits.
    """
    with torch.no_grad():
        centre = teacher.mean(dim=0)
        return squared_distances(student - centre, teacher - centre)


def costs(student: Float[Tensor, "n d"], teacher: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """All distances by one matrix product, without gradient: to find a plan with."""
    return squared_costs(student, teacher).sqrt_()


def cross_costs(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "m d"]
) -> Float[Tensor, "n m"]:
    r"""Squared distances up to what no plan can change, halved: to find a plan with.

    .. math:: \langle s_i, \bar t - t_j \rangle = \tfrac12 \|s_i - t_j\|^2 + r_i + c_j

    Plans between given margins cost the same in rows' and columns' constants. With one sample taken
    about its mean, rounding grows with how far from zero the features are, not with its square.
    """
    with torch.no_grad():
        return student @ (teacher.mean(dim=0) - teacher).mT


def transported(
    plan: Plan,
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    *,
    power: Literal[1, 2] = 2,
) -> Float[Tensor, ""]:
    """What a plan costs: the masses of its entries times the distances of their rows to a power.

    Taken from the rows, not from the matrix of costs, whose entries lose digits to cancellation in
    float32. The gradient is that with the plan held fixed (envelope theorem); at a tie between
    plans it is a subgradient. Squares are differentiable once.
    """
    if power == 2:
        squares: Tensor = _SquaresTransported.apply(student, teacher, plan)
        return squares
    here = student.index_select(0, plan.row)
    lengths: Tensor = torch.linalg.vector_norm(here - teacher.index_select(0, plan.column), dim=1)
    return plan.mass @ lengths


def squared_wasserstein(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance between two samples of uniform weights.

    .. math:: W_2^2 = \min_{\gamma \in \Gamma(1/n, 1/m)} \sum_{ij} \gamma_{ij} \|s_i - t_j\|^2
    """
    check_same_width(student, teacher)
    plan = transport_plan(cross_costs(student, teacher))
    return transported(plan, student, teacher)


def wasserstein_1(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    r"""1-Wasserstein distance between two samples of uniform weights; at most W2.

    .. math:: W_1 = \min_{\gamma \in \Gamma(1/n, 1/m)} \sum_{ij} \gamma_{ij} \|s_i - t_j\|
    """
    check_same_width(student, teacher)
    plan = transport_plan(costs(student, teacher))
    return transported(plan, student, teacher, power=1)


def diagonal_plan_mass(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]
) -> Float[Tensor, ""]:
    r"""The share of samples that an exact plan leaves with their own teacher's feature.

    .. math:: \sum_i \gamma^*_{ii}

    At 1 the distance is the mean squared distance of the pairs, and so are its class-conditional
    and joint forms: they all have become one loss.
    """
    check_same_width(student, teacher)
    plan = transport_plan(cross_costs(student, teacher))
    return plan.mass[plan.row == plan.column].sum()


class _SquaresTransported(torch.autograd.Function):
    """One pass over the rows on the way back, where autograd's own makes five."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, plan: Plan) -> Tensor:
        here = student if plan.one_each else student.index_select(0, plan.row)
        ways = here - teacher.index_select(0, plan.column)
        ctx.save_for_backward(ways)
        ctx.plan, ctx.num_rows = plan, (len(student), len(teacher))
        lengths: Tensor = torch.linalg.vector_norm(ways, dim=1)
        return plan.mass @ lengths.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        plan: Plan = ctx.plan
        (ways,) = ctx.saved_tensors
        pull = (2 * gradient * plan.mass)[:, None] * ways
        of_student, of_teacher = ctx.needs_input_grad[:2]
        n, m = ctx.num_rows
        to_teacher = -class_sums(pull, plan.column, m) if of_teacher else None
        if of_student and not plan.one_each:
            pull = class_sums(pull, plan.row, n)
        return pull if of_student else None, to_teacher, None
