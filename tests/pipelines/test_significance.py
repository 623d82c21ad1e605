"""The paired test and its correction, beside scipy and a count by hand."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from pipelines.significance import holm, paired_test


def test_the_paired_test_is_scipy_s_of_the_two_columns() -> None:
    values, control = [0.71, 0.74, 0.70, 0.75], [0.70, 0.71, 0.71, 0.70]
    expected = stats.ttest_rel(values, control).pvalue
    assert paired_test(values, control) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("values", [[0.7], [0.7, 0.8]])
def test_no_spread_is_no_evidence(values: list[float]) -> None:
    assert math.isnan(paired_test(values, [value - 0.5 for value in values]))


def test_holm_multiplies_the_smallest_most_and_never_turns_the_order() -> None:
    # 0.01 x 3, 0.02 x 2, then 0.03 x 1 raised to what the one before it got
    assert holm([0.02, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_what_could_not_be_tested_does_not_count() -> None:
    corrected = holm([math.nan, 0.01, 0.02])
    assert math.isnan(corrected[0])
    assert corrected[1:] == pytest.approx([0.02, 0.02])
