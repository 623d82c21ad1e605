"""The potentials of entropic transport: Sinkhorn in the log domain, finished by Newton's method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

NUM_SINKHORN, NUM_NEWTON = 3, 50  # at most, for each reg on the way


@dataclass(frozen=True, slots=True)
class Dual:
    r"""The dual of entropic transport between uniform weights, for a cost in units of its reg.

    .. math:: \max_{f, g} \overline{\phi(f)} + \overline{\phi(g)} - \sum_{ij} P_{ij} + 1, \quad
        P_{ij} = \frac1{nm} e^{f_i + g_j - C_{ij}}, \quad \phi(x) = \rho (1 - e^{-x / \rho})

    with :math:`\rho` = ``price``, in the same unit, what it costs to leave mass; where it is
    infinite :math:`\phi(x) = x` and all mass is moved. g is always the best one for its f.
    """

    cost: Float[Tensor, "n m"]
    price: float

    def plan(self, f: Float[Tensor, " n"], g: Float[Tensor, " m"]) -> Float[Tensor, "n m"]:
        """What is moved under these potentials."""
        return (f[:, None] + g - self.cost).exp() / self.cost.numel()

    def value(self, f: Float[Tensor, " n"], g: Float[Tensor, " m"]) -> Float[Tensor, ""]:
        """What is maximised; with the best g the plan's mass is that of the columns."""
        return self._phi(f).mean() + self._phi(g).mean() - self.mass(g).mean() + 1

    def mass(self, x: Tensor) -> Tensor:
        """What the rows or columns of such potentials should move, relative to their weights."""
        return (-x / self.price).exp()

    def best_rows(self, g: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
        """The f that moves what it should with this g."""
        return (math.log(len(g)) - (g - self.cost).logsumexp(dim=1)) / (1 + 1 / self.price)

    def best_columns(self, f: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
        """The g that moves what it should with this f."""
        return (math.log(len(f)) - (f[:, None] - self.cost).logsumexp(dim=0)) / (1 + 1 / self.price)

    def _phi(self, x: Tensor) -> Tensor:
        return x if math.isinf(self.price) else -self.price * torch.expm1(-x / self.price)


def potentials(dual: Dual) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """The f and g that solve the dual, to 1e-12 of the largest mass of a row, or to rounding.

    Sinkhorn's iterations alone need thousands of steps where samples are well separated, or mass is
    dear but may be left, so after a few of them Newton's method takes over; first with a larger
    reg, halved step by step, where costs are large beside it.
    """
    f, g = (dual.cost.new_zeros(size) for size in dual.cost.shape)
    largest = max(float(dual.cost.max()), 1.0)
    rounding = 4 * torch.finfo(dual.cost.dtype).eps * largest
    for halvings in range(max(0, math.ceil(math.log2(largest / 50))), -1, -1):
        tolerance = 1e-3 if halvings else max(1e-12, rounding)
        softened = Dual(dual.cost / 2**halvings, dual.price / 2**halvings)
        # potentials in units of reg: twice as many of them in a reg of half the size
        f, g = _sinkhorn(softened, 2 * g, tolerance)
        f, g = _newton(softened, f, g, tolerance)
    return f, g


def _sinkhorn(dual: Dual, g: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    for _ in range(NUM_SINKHORN):
        before = g
        f = dual.best_rows(g)
        g = dual.best_columns(f)
        if bool((g - before).abs().max() < tolerance):
            break
    return f, g


def _newton(dual: Dual, f: Tensor, g: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    for _ in range(NUM_NEWTON):
        wanted = dual.mass(f) / len(f)
        plan = dual.plan(f, g)
        error = wanted - plan.sum(dim=1)
        if bool(error.abs().max() <= tolerance * wanted.max()):
            break
        step, info = torch.linalg.solve_ex(_curvature(plan, wanted, dual.price), error)
        if bool(info) or not bool(step.isfinite().all()):
            break
        ahead = _ahead(dual, f, g, step, float(error @ step))
        if ahead is None:
            break
        f, g = ahead
    return f, g


def _curvature(plan: Tensor, wanted: Tensor, price: float) -> Tensor:
    """How fast the rows' errors fall with their potentials, while g remains the best."""
    limits = torch.finfo(plan.dtype)
    own = (plan.sum(dim=1) + wanted / price).clamp(min=limits.tiny)
    columns = plan.sum(dim=0).clamp(min=limits.tiny)
    curvature = (plan / columns) @ plan.mT / (-1 - 1 / price)
    # without the product's rounding it may be singular: where nothing moves between two clusters
    curvature.diagonal().add_(own * (1 + len(own) * limits.eps))
    return curvature


def _ahead(
    dual: Dual, f: Tensor, g: Tensor, step: Tensor, gain: float
) -> tuple[Tensor, Tensor] | None:
    """Where a share of the step, found by quartering, raises the value by enough; None if nowhere.

    ``gain`` is what the whole step promises.
    """
    value = dual.value(f, g)
    # near the end the gain is smaller than this, and the whole step is right
    rounding = 4 * torch.finfo(f.dtype).eps * float(f.abs().max() + g.abs().max())
    rate = 1.0
    while rate > 1e-6:
        rows = f + rate * step
        columns = dual.best_columns(rows)
        if bool(dual.value(rows, columns) - value >= 1e-4 * rate * gain - rounding):
            return rows, columns
        rate /= 4
    return None
