"""Whether one configuration beats another over the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def paired_test(values: Sequence[float], control: Sequence[float]) -> float:
    """Two-sided p-value of Student's paired t-test, the two in the same order of seeds.

    NaN for fewer than two pairs, and where all pairs differ by the same amount; ValueError where
    the two have not as many seeds.
    """
    if len(values) != len(control):
        raise ValueError(f"expected the same seeds of both, got {len(values)} and {len(control)}")
    differences = np.subtract(values, control)
    if len(differences) < 2 or np.ptp(differences) == 0:
        return math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for the number of comparisons; NaN stays NaN and does not count.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order = [i for i in np.argsort(p_values) if not math.isnan(p_values[i])]
    corrected, least = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = least
    return corrected
