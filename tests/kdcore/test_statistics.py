"""Statistics of maps: channels as samples, and moments of blocks, against loops."""

from __future__ import annotations

from math import ceil, sqrt
from statistics import mean, variance

import pytest
import torch
from torch import Tensor

from kdcore.losses.statistics import channel_moments, neuron_selectivity


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_neuron_selectivity_equals_its_loop() -> None:
    student, teacher = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 4, 2, 2).double()

    def kernel(first: Tensor, second: Tensor) -> float:
        dots = [[float((u * v).sum() / (u.norm() * v.norm())) ** 2 for v in second] for u in first]
        return mean(mean(row) for row in dots)

    pairs = list(zip(student, teacher, strict=True))
    expected = mean(kernel(s, s) + kernel(t, t) - 2 * kernel(s, t) for s, t in pairs)
    torch.testing.assert_close(neuron_selectivity(student, teacher), scalar(expected))


def test_neuron_selectivity_is_the_distance_of_mean_outer_products() -> None:
    student, teacher = torch.randn(2, 3, 3, 2).double(), torch.randn(2, 5, 3, 2).double()

    def outer(maps: Tensor) -> Tensor:
        rows = maps.flatten(2) / maps.flatten(2).norm(dim=2, keepdim=True)
        return torch.einsum("bci,bcj->bij", rows, rows) / rows.shape[1]

    expected = (outer(student) - outer(teacher)).square().sum(dim=(1, 2)).mean()
    torch.testing.assert_close(neuron_selectivity(student, teacher), expected)


def moments(channel: list[list[float]], grid: int) -> list[tuple[float, float]]:
    """Mean and standard deviation of each block; one position has no variance."""
    height, width = len(channel), len(channel[0])
    found = []
    for i in range(grid):
        for j in range(grid):
            rows = range(i * height // grid, ceil((i + 1) * height / grid))
            columns = range(j * width // grid, ceil((j + 1) * width / grid))
            block = [channel[row][column] for row in rows for column in columns]
            spread = variance(block) if len(block) > 1 else 0.0
            found.append((mean(block), sqrt(spread + 1e-5)))
    return found


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 4), (1, 1)])
@pytest.mark.parametrize("grid", [1, 2, 4])
def test_channel_moments_equal_their_loop(size: tuple[int, int], grid: int) -> None:
    student, teacher = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    means = deviations = 0.0
    channels = (maps.flatten(0, 1).tolist() for maps in (student, teacher))
    for here, there in zip(*channels, strict=True):
        for s, t in zip(moments(here, grid), moments(there, grid), strict=True):
            means += (s[0] - t[0]) ** 2 / grid**2 / 2
            deviations += (s[1] - t[1]) ** 2 / grid**2 / 2
    value = channel_moments(student, teacher, grid=grid, mean_weight=2.0, std_weight=0.5)
    torch.testing.assert_close(value, scalar(2 * means + deviations / 2))


def test_channel_moments_keep_their_digits_far_from_zero() -> None:
    student, teacher = torch.randn(2, 2, 3, 8, 8)
    near = channel_moments(student, teacher)
    torch.testing.assert_close(
        channel_moments(student + 4096, teacher + 4096), near, rtol=0.01, atol=0
    )


@pytest.mark.usefixtures("without_shape_checks")
def test_channels_that_torch_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the same shape, got \(2, 3, 4, 4\) and \(2, 1, 4, 4\)"):
        channel_moments(torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4))
