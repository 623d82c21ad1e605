"""Losses on the predictions of a batch, against loops."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcore.losses.logits import kd
from kdcore.losses.predictions import (
    batch_gram,
    class_gram,
    multi_level_kd,
    prediction_correlation,
)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64) * 2
    return student, teacher


def test_prediction_correlation_is_pearson_s_over_rows_and_columns(
    logits: tuple[Tensor, Tensor],
) -> None:
    q, p = ((rows / 2).softmax(1).numpy() for rows in logits)
    rows = np.mean([1 - np.corrcoef(q[b], p[b])[0, 1] for b in range(3)])
    columns = np.mean([1 - np.corrcoef(q[:, k], p[:, k])[0, 1] for k in range(4)])
    value = prediction_correlation(*logits, beta=2.0, gamma=3.0, temperature=2.0)
    expected = torch.tensor(4 * (2 * rows + 3 * columns))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)  # eps is 1e-8


def test_the_grams_equal_their_loops(logits: tuple[Tensor, Tensor]) -> None:
    q, p = ((rows / 2).softmax(1).tolist() for rows in logits)
    samples, classes = range(3), range(4)
    of_samples = sum(
        sum(p[a][k] * p[b][k] - q[a][k] * q[b][k] for k in classes) ** 2
        for a, b in product(samples, samples)
    )
    of_classes = sum(
        sum(p[b][k] * p[b][j] - q[b][k] * q[b][j] for b in samples) ** 2
        for k, j in product(classes, classes)
    )
    for gram, expected in ((batch_gram, of_samples / 3), (class_gram, of_classes / 4)):
        value = gram(*logits, temperatures=(2.0,))
        torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_multi_level_kd_sums_its_three_parts_over_temperatures(
    logits: tuple[Tensor, Tensor],
) -> None:
    expected = torch.zeros((), dtype=torch.float64)
    for temperature in (2.0, 5.0):
        expected += kd(*logits, temperature=temperature)
        expected += 3 * batch_gram(*logits, temperatures=(temperature,))
        expected += 7 * class_gram(*logits, temperatures=(temperature,))
    value = multi_level_kd(*logits, temperatures=(2.0, 5.0), batch_weight=3.0, class_weight=7.0)
    torch.testing.assert_close(value, expected)
