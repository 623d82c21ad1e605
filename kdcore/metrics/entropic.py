"""Transport with an entropy, of all mass or of what is worth its way."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_same_width
from kdcore.metrics.distances import distances
from kdcore.metrics.potentials import Dual, potentials


class EntropicPlan(NamedTuple):
    """A dense plan between uniform weights, and the value of the problem that it solves."""

    plan: Float[Tensor, "n m"]
    value: Float[Tensor, ""]


def entropic_plan(
    cost: Float[Tensor, "n m"],
    *,
    reg: float | Float[Tensor, ""],
    margin: float = math.inf,
) -> EntropicPlan:
    r"""The plan of entropic transport between uniform weights a and b, without gradient.

    .. math:: \min_{P \ge 0} \langle P, C \rangle + \epsilon \, \mathrm{KL}(P \| a b^\top)
        + \tau \, \mathrm{KL}(P 1 \| a) + \tau \, \mathrm{KL}(P^\top 1 \| b)

    with :math:`\epsilon` = ``reg``, :math:`\tau` = ``margin``, infinite where no mass may be left.
    Solved to 1e-12 in the log domain in float64, on the cost's device.

    Raises ValueError for a cost that is not finite.
    """
    with torch.no_grad():
        scaled = cost.detach().double() / reg
        if not bool(torch.isfinite(scaled).all()):
            raise ValueError(
                "the cost between student and teacher is not finite: a feature overflowed"
            )
        dual = Dual(scaled, float(margin / reg))
        found = potentials(dual)
        return EntropicPlan(dual.plan(*found).to(cost), (reg * dual.value(*found)).to(cost))


def entropic_wasserstein(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    *,
    reg: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    r"""Entropic squared Wasserstein distance, with its entropy.

    .. math:: \min_{P \in \Gamma(1/n, 1/m)} \sum_{ij} P_{ij} \| s_i - t_j \|^2
        + \epsilon \, \mathrm{KL}(P \| a b^\top)

    The gradient is that with the plan held fixed, which is exact (envelope theorem). Not zero
    between equal samples: see ``sinkhorn_divergence``. ``reg`` has the unit of a squared distance.

    Source: Cuturi 2013, arXiv:1306.0895, with the entropy relative to the product of the margins.
    """
    return _with_envelope_gradient(student, teacher, reg, math.inf)


def unbalanced_wasserstein(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    *,
    reg: float,
    margin: float,
) -> Float[Tensor, ""]:
    r"""Entropic transport that may leave mass behind, at a price.

    .. math:: \min_{P \ge 0} \langle P, C \rangle + \epsilon \, \mathrm{KL}(P \| a b^\top)
        + \tau \, \mathrm{KL}(P 1 \| a) + \tau \, \mathrm{KL}(P^\top 1 \| b)

    with :math:`\epsilon` = ``reg``, :math:`\tau` = ``margin``, C squared distances, a and b
    uniform, and KL that of measures, with the terms of their masses. An outlier farther than about
    :math:`2 \tau` is left alone, so that its gradient fades: POT's scalings of it underflow. The
    gradient with the plan held fixed is exact (envelope theorem). ``entropic_wasserstein`` as the
    price grows.

    Source: Chizat et al. 2018, arXiv:1607.05816.
    """
    return _with_envelope_gradient(student, teacher, reg, margin)


def sharp_wasserstein(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    *,
    reg: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    r"""What the entropic plan costs, without its entropy: an upper bound of the exact distance.

    .. math:: \langle P_\epsilon, C \rangle

    The gradient takes the plan for a constant, which it is not: use ``entropic_wasserstein`` to
    train.
    """
    plan, _ = _plan_between(student, teacher, reg, math.inf)
    return _linear_cost(plan, student, teacher)


def sinkhorn_divergence(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    *,
    reg: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    r"""Entropic distance less what it leaves between each sample and itself.

    .. math:: W_\epsilon(S, T) - \tfrac12 W_\epsilon(S, S) - \tfrac12 W_\epsilon(T, T)

    Zero between equal samples; the exact squared distance as reg goes to 0, the squared distance of
    means as it grows, and without the upward bias of exact plans between unpaired batches.

    Source: Feydy et al. 2019, arXiv:1810.08278, equation 3.
    """
    own = entropic_wasserstein(student, student, reg=reg) + entropic_wasserstein(
        teacher, teacher, reg=reg
    )
    return entropic_wasserstein(student, teacher, reg=reg) - own / 2


def _with_envelope_gradient(
    student: Tensor, teacher: Tensor, reg: float | Tensor, margin: float
) -> Tensor:
    plan, value = _plan_between(student, teacher, reg, margin)
    linear = _linear_cost(plan, student, teacher)
    return value + linear - linear.detach()


def _plan_between(
    student: Tensor, teacher: Tensor, reg: float | Tensor, margin: float
) -> EntropicPlan:
    check_same_width(student, teacher)
    with torch.no_grad():
        return entropic_plan(distances(student, teacher).square(), reg=reg, margin=margin)


def _linear_cost(plan: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    centre = teacher.mean(dim=0)  # of no effect but on rounding
    here, there = student - centre, teacher - centre
    own = plan.sum(dim=1) @ here.square().sum(dim=1) + plan.sum(dim=0) @ there.square().sum(dim=1)
    return own - 2 * (plan.mT @ here * there).sum()
