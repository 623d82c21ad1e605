"""All distances by one product: as by differences, down to rows that are nearly equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdcore.metrics.distances import distances, squared_distances

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_differences(first: Tensor, second: Tensor) -> Tensor:
    return torch.linalg.vector_norm(first[:, None] - second, dim=2)


@DTYPES
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (5, 7, 3), (7, 5, 40)])
def test_the_distances_are_those_by_differences(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    pair = rows(n, d).to(dtype), rows(m, d, seed=1).to(dtype)
    torch.testing.assert_close(distances(*pair), by_differences(*pair))
    torch.testing.assert_close(squared_distances(*pair), by_differences(*pair).square())


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_rows_that_differ_in_their_last_digits_keep_their_distances(
    dtype: torch.dtype, offset: float
) -> None:
    first = (rows(6, 50) + offset).to(dtype)
    second = first + 1e-3 * rows(6, 50, seed=1).to(dtype)
    torch.testing.assert_close(
        distances(first, second), by_differences(first, second), rtol=1e-4, atol=0.0
    )


@DTYPES
def test_equal_rows_are_at_distance_zero_with_slope_zero(dtype: torch.dtype) -> None:
    first = (10 + rows(40, 300)).to(dtype).requires_grad_()
    order = torch.randperm(40)
    between = distances(first, first.detach()[order])[order, torch.arange(40)]
    torch.testing.assert_close(between, torch.zeros(40, dtype=dtype), rtol=0, atol=0)
    between.sum().backward()
    torch.testing.assert_close(first.grad, torch.zeros_like(first), rtol=0, atol=0)


@pytest.mark.usefixtures("without_shape_checks")
def test_the_gradient_is_that_of_finite_differences() -> None:
    first, second = rows(4, 3).requires_grad_(), rows(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(distances, (first, second))
    assert torch.autograd.gradcheck(lambda x: distances(x, x), (first,))
