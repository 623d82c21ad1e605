"""Tables in fixed point: exact to their last bit, and so the same on every machine."""

from __future__ import annotations

import decimal
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.views.draws import happens, scaled
from pipelines.views.fixed_point import (
    LEVELS,
    ONE,
    SHARES,
    beta_limits,
    fixed,
    root_levels,
    root_ratios,
    root_shares,
)
from pipelines.views.randaugment import COSINES, SINES


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 2.0, 3.7, 32.0])
def test_shares_have_the_beta_distribution(alpha: float) -> None:
    middles = (np.arange(SHARES) + 0.5) / SHARES
    expected = stats.beta(alpha, alpha).cdf(middles)
    np.testing.assert_allclose(beta_limits(alpha).double() / 2**32, expected, rtol=0, atol=2**-31)


def test_shares_do_not_depend_on_the_decimal_context() -> None:
    beta_limits.cache_clear()
    with decimal.localcontext(decimal.Context(prec=3)):
        rough = beta_limits(0.3), root_ratios(0.31, 3.1)
    beta_limits.cache_clear()
    root_ratios.cache_clear()
    for one, other in zip(rough, (beta_limits(0.3), root_ratios(0.31, 3.1)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_root_levels_are_floors_of_square_roots() -> None:
    middles = 0.08 + 0.92 * (np.arange(LEVELS) + 0.5) / LEVELS
    np.testing.assert_array_equal(root_levels(0.08, 1.0), np.floor(np.sqrt(middles) * ONE))


def test_root_ratios_are_even_in_the_logarithm() -> None:
    parts = (np.arange(LEVELS) + 0.5) / LEVELS
    expected = np.sqrt(0.3 * (1 / 0.3 / 0.3) ** parts) * ONE
    np.testing.assert_allclose(root_ratios(0.3, 1 / 0.3), expected, rtol=0, atol=1)


@pytest.mark.parametrize("size", [1, 7, 32, 224])
def test_root_shares_are_cutmix_s_sides(size: int) -> None:
    expected = [int(size * math.sqrt(share / SHARES)) for share in range(SHARES + 1)]
    assert root_shares(size).tolist() == expected


def test_sines_are_far_from_where_rounding_could_differ() -> None:
    for degrees in range(31):
        angle = math.radians(degrees)
        for held, exact in ((SINES, math.sin(angle)), (COSINES, math.cos(angle))):
            assert abs(held[degrees] - exact * ONE) < 0.499


def test_fixed_rounds_half_up() -> None:
    assert [fixed(value) for value in (0.0, 1.0, 0.4, -0.4, 1.5 / ONE)] == [
        0,
        ONE,
        26214,
        -26214,
        2,
    ]


@settings(deadline=None)
@given(word=st.integers(0, 2**32 - 1), count=st.integers(1, 2**30))
def test_a_scaled_word_is_below_its_count(word: int, count: int) -> None:
    assert int(scaled(torch.tensor(word), count)) == word * count // 2**32


def test_probabilities_of_0_and_1_are_never_and_always() -> None:
    words = torch.tensor([0, 2**31, 2**32 - 1])
    assert not bool(happens(words, 0.0).any())
    assert bool(happens(words, 1.0).all())
    assert happens(words, 0.5).tolist() == [True, False, False]
