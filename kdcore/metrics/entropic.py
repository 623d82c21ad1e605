"""Transport with an entropy: Sinkhorn in the log domain, finished by Newton's method."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_same_width


class EntropicPlan(NamedTuple):
    """A dense plan between uniform weights, and the value of the problem that it solves."""

    plan: Float[Tensor, "n m"]
    value: Float[Tensor, ""]


def entropic_plan(
    cost: Float[Tensor, "n m"],
    *,
    reg: float | Float[Tensor, ""],
    num_iterations: int = 100,
    num_newton: int = 50,
    tolerance: float = 1e-12,
) -> EntropicPlan:
    r"""The plan of entropic transport between uniform weights a and b, without gradient.

    .. math:: \min_{P \in \Gamma(a, b)} \langle P, C \rangle
        + \epsilon \, \mathrm{KL}(P \| a b^\top)

    Sinkhorn's iterations alone need thousands of steps where samples are well separated, so after
    ``num_iterations`` of them Newton's method on the concave dual of one potential takes over,
    first with a larger reg, halved step by step, where reg is small beside the costs,
    until the largest error of a margin, relative to 1/n, is below the tolerance. In float64
    throughout, on the cost's device.

    Raises ValueError for a cost that is not finite.
    """
    with torch.no_grad():
        scaled = cost.detach().double() / reg
        if not bool(torch.isfinite(scaled).all()):
            raise ValueError(
                "the cost between student and teacher is not finite: a feature overflowed"
            )
        f, g = scaled.new_zeros(len(scaled)), scaled.new_zeros(scaled.shape[1])
        for halvings in range(_num_halvings(scaled), -1, -1):
            softened = scaled / 2**halvings
            # potentials in units of reg: twice as many of them in a reg of half the size
            f, g = _sinkhorn(softened, 2 * f, 2 * g, num_iterations, tolerance)
            f, g = _newton(softened, f, g, num_newton, tolerance)
        log_uniform = -math.log(scaled.numel())
        plan = (f[:, None] + g - scaled + log_uniform).exp()
        value = reg * (f.mean() + g.mean())
        return EntropicPlan(plan.to(cost), value.to(cost))


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
    plan, value = _plan_between(student, teacher, reg)
    linear = _linear_cost(plan, student, teacher)
    return value + linear - linear.detach()


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
    return _linear_cost(_plan_between(student, teacher, reg).plan, student, teacher)


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


def _plan_between(student: Tensor, teacher: Tensor, reg: float | Tensor) -> EntropicPlan:
    check_same_width(student, teacher)
    with torch.no_grad():
        exact = "donot_use_mm_for_euclid_dist"
        cost = torch.cdist(student, teacher, compute_mode=exact).square()
        return entropic_plan(cost, reg=reg)


def _linear_cost(plan: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    centre = teacher.mean(dim=0)  # of no effect but on rounding
    here, there = student - centre, teacher - centre
    own = plan.sum(dim=1) @ here.square().sum(dim=1) + plan.sum(dim=0) @ there.square().sum(dim=1)
    return own - 2 * (plan.mT @ here * there).sum()


def _num_halvings(cost: Tensor) -> int:
    return max(0, math.ceil(math.log2(max(float(cost.max()), 1.0) / 50)))


def _sinkhorn(
    cost: Tensor, f: Tensor, g: Tensor, num_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Potentials in units of reg, against the product of the margins."""
    n, m = cost.shape
    for _ in range(num_iterations):
        before = f
        f = math.log(m) - (g - cost).logsumexp(dim=1)
        g = math.log(n) - (f[:, None] - cost).logsumexp(dim=0)
        if bool((f - before).abs().max() < tolerance):
            break
    return f, g


def _newton(
    cost: Tensor, f: Tensor, g: Tensor, num_steps: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Maximise mean(f) + mean(g(f)), g(f) the best potential of the columns for f."""
    n, m = cost.shape

    def best_columns(rows: Tensor) -> Tensor:
        return math.log(n) - (rows[:, None] - cost).logsumexp(dim=0)

    for _ in range(num_steps):
        plan = (f[:, None] + g - cost).exp() / (n * m)
        margin = plan.sum(dim=1)
        error = 1 / n - margin
        if bool(n * error.abs().max() < tolerance):
            break
        # singular along constants, which change nothing: the last term removes them
        curvature = margin.diag() - m * plan @ plan.mT + 1 / n**2
        step, info = torch.linalg.solve_ex(curvature, error)
        if bool(info) or not bool(step.isfinite().all()):
            break
        here, rate = f.mean() + g.mean(), 1.0
        gain = error @ step
        while rate > 1e-6:
            rows = f + rate * step
            columns = best_columns(rows)
            if bool(rows.mean() + columns.mean() - here >= 1e-4 * rate * gain - 1e-15):
                break
            rate /= 4
        else:
            break
        f, g = rows, columns
    return f, g
