"""Numbers in fixed point, made without floating-point functions: the same on every machine.

Tables of real functions come from ``decimal`` and ``math.isqrt``, which compute in software.
"""

from __future__ import annotations

import decimal
import math
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

BITS = 16  # after the point
ONE = 1 << BITS
LEVELS = 1024  # of a number that is drawn from a range
SHARE_BITS = 8
SHARES = 1 << SHARE_BITS  # of a whole, in which one picture is mixed with another

_EXACT = decimal.Context(prec=40)


def fixed(value: float) -> int:
    """The nearest multiple of 2^-16, as an integer; exact but for the rounding, half up."""
    return math.floor(Fraction(value) * ONE + Fraction(1, 2))


@lru_cache(maxsize=32)
def root_levels(low: float, high: float) -> Tensor:
    """Square roots of the middles of LEVELS equal parts of a range."""
    ends = Fraction(low), Fraction(high)
    width = (ends[1] - ends[0]) / LEVELS
    middles = (ends[0] + width * (level + Fraction(1, 2)) for level in range(LEVELS))
    return torch.tensor([math.isqrt(math.floor(middle * ONE**2)) for middle in middles])


@lru_cache(maxsize=32)
def root_shares(size: int) -> Tensor:
    """Whole pixels of a side, times the square root of 0 to all SHARES."""
    return torch.tensor([math.isqrt(size**2 * share // SHARES) for share in range(SHARES + 1)])


@lru_cache(maxsize=32)
def root_ratios(low: float, high: float) -> Tensor:
    """Square roots of the middles of LEVELS parts of a range that are equal in the logarithm."""
    with decimal.localcontext(_EXACT):
        ends = decimal.Decimal(low), decimal.Decimal(high)
        half_step = (ends[1] / ends[0]) ** (decimal.Decimal(1) / (4 * LEVELS))
        first = ends[0].sqrt() * half_step * ONE
        return torch.tensor([int(first * half_step ** (2 * level)) for level in range(LEVELS)])


@lru_cache(maxsize=32)
def beta_limits(alpha: float) -> Tensor:
    r"""Where shares change: a word below ``limits[k]`` is a share of at most k / SHARES.

    .. math:: I_x(\alpha, \alpha) = \frac{S(x)}{2 S(1/2)}, \quad
        S(x) = x^\alpha \sum_n \frac{(1 - \alpha)_n}{n! \, (\alpha + n)} x^n \quad (x \le 1/2)

    the distribution function of Beta(alpha, alpha) at the middles between shares; above one half by
    symmetry.

    Source: Olver and others, NIST DLMF, equation 8.17.7 with 15.2.1.
    """
    with decimal.localcontext(_EXACT):
        a = decimal.Decimal(alpha)
        middles = [decimal.Decimal(2 * k + 1) / (2 * SHARES) for k in range(SHARES // 2)]
        whole = 2 * _incomplete_beta(decimal.Decimal("0.5"), a)
        low = [int(_incomplete_beta(x, a) / whole * 2**32) for x in middles]
    return torch.tensor(low + [2**32 - limit for limit in reversed(low)])


def _incomplete_beta(x: decimal.Decimal, alpha: decimal.Decimal) -> decimal.Decimal:
    """S(x) to 30 digits; the factors end, or fall by half."""
    total, factor, number = decimal.Decimal(0), decimal.Decimal(1), 0
    while abs(factor) > decimal.Decimal("1e-30"):
        total += factor / (alpha + number)
        number += 1
        factor *= x * (number - alpha) / number
    return total * x**alpha
