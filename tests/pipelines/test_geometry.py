"""Boxes and resampling against exact fractions, pixel by pixel."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pipelines.augment import BoxConfig, EraseConfig, ResizedCropConfig
from pipelines.views.boxes import ATTEMPTS, Boxes, drawn_boxes
from pipelines.views.draws import random_words
from pipelines.views.geometry import WEIGHT, resized, sampled

HALF = Fraction(1, 2)


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()


def between(image: np.ndarray, row: Fraction, column: Fraction) -> Fraction:
    """The bilinear value at a place of one channel, black outside, without rounding."""
    total = Fraction(0)
    for y in (math.floor(row), math.floor(row) + 1):
        for x in (math.floor(column), math.floor(column) + 1):
            if 0 <= y < image.shape[0] and 0 <= x < image.shape[1]:
                weight = (1 - abs(row - y)) * (1 - abs(column - x))
                total += weight * int(image[y, x])
    return total


@pytest.mark.parametrize("box", [(0, 0, 6, 8), (1, 2, 4, 3), (5, 7, 1, 1), (0, 3, 6, 2)])
def test_resized_is_bilinear_within_the_box(box: tuple[int, int, int, int]) -> None:
    image = noise(1, 2, 6, 8)
    top, left, height, width = box
    seen = resized(image, Boxes(*(torch.tensor([value]) for value in box)))
    for channel in range(2):
        inside = image[0, channel, top : top + height, left : left + width].numpy()
        for y in range(6):
            for x in range(8):
                row = (y + HALF) * Fraction(height, 6) - HALF
                column = (x + HALF) * Fraction(width, 8) - HALF
                row = min(max(row, Fraction(0)), Fraction(height - 1))
                column = min(max(column, Fraction(0)), Fraction(width - 1))
                error = int(seen[0, channel, y, x]) - between(inside, row, column)
                # half a level to round, and two weights short by up to 2^-11 each
                assert abs(error) <= HALF + 2 * Fraction(255, WEIGHT)


def test_the_whole_picture_resized_is_the_picture() -> None:
    image = noise(3, 2, 6, 8)
    start, height, width = (torch.full((3,), value) for value in (0, 6, 8))
    seen = resized(image, Boxes(start, start, height, width))
    torch.testing.assert_close(seen, image, rtol=0, atol=0)


def test_sampled_is_bilinear_and_black_outside() -> None:
    image = noise(1, 2, 5, 6)
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(-3 * WEIGHT, 8 * WEIGHT, (1, 5, 6), generator=generator)
    column = torch.randint(-3 * WEIGHT, 9 * WEIGHT, (1, 5, 6), generator=generator)
    seen = sampled(image, row, column)
    for channel in range(2):
        for y in range(5):
            for x in range(6):
                place = Fraction(int(row[0, y, x]), WEIGHT), Fraction(int(column[0, y, x]), WEIGHT)
                exact = between(image[0, channel].numpy(), *place)
                assert abs(int(seen[0, channel, y, x]) - exact) <= HALF


def plain_box(words: list[int], height: int, width: int, config: BoxConfig) -> list[int] | None:
    """The published loop in floating point, from the same words."""
    for area, ratio, down, right in zip(*[iter(words)] * 4, strict=True):
        parts = [(math.floor(word * 1024 / 2**32) + 0.5) / 1024 for word in (area, ratio)]
        target = height * width * (config.area[0] + parts[0] * (config.area[1] - config.area[0]))
        logs = math.log(config.ratio[0]), math.log(config.ratio[1])
        shape = math.exp(logs[0] + parts[1] * (logs[1] - logs[0]))
        high, wide = (round(math.sqrt(side)) for side in (target / shape, target * shape))
        if 0 < high <= height and 0 < wide <= width:
            top = down * (height - high + 1) // 2**32
            return [top, right * (width - wide + 1) // 2**32, high, wide]
    return None


@pytest.mark.parametrize("config", [ResizedCropConfig(), EraseConfig()])
@pytest.mark.parametrize("size", [(32, 32), (224, 200), (9, 7)])
def test_boxes_are_those_of_the_published_loop(config: BoxConfig, size: tuple[int, int]) -> None:
    words = random_words(torch.arange(500), view=1, stream="erase", seed=0, blocks=ATTEMPTS)
    boxes = torch.stack([*drawn_boxes(words, size, config, fallback=size)], dim=1).tolist()
    expected = [plain_box(row, *size, config) or [0, 0, *size] for row in words.tolist()]
    assert sum(one == other for one, other in zip(boxes, expected, strict=True)) >= 498
    # a side within 1e-4 of a half may round otherwise, by one
    assert max(abs(np.array(boxes) - np.array(expected)).flatten()) <= 1


def test_where_no_box_fits_there_is_the_fallback() -> None:
    config = BoxConfig(area=(0.9, 1.0), ratio=(10.0, 11.0))
    words = random_words(torch.arange(5), view=1, stream="erase", seed=0, blocks=ATTEMPTS)
    for fallback in ((8, 9), (0, 0)):
        boxes = drawn_boxes(words, (8, 9), config, fallback=fallback)
        assert {(int(high), int(wide)) for high, wide in zip(*boxes[2:], strict=True)} == {fallback}


def test_areas_are_uniform_where_every_box_fits() -> None:
    config = BoxConfig(area=(0.1, 0.4), ratio=(0.9, 1.1))
    words = random_words(torch.arange(2000), view=1, stream="erase", seed=0, blocks=ATTEMPTS)
    boxes = drawn_boxes(words, (2000, 2000), config, fallback=(0, 0))
    share = (boxes.height * boxes.width / 2000**2).numpy()
    assert stats.kstest(share, stats.uniform(0.1, 0.3).cdf).pvalue > 0.01


def test_a_box_contains_its_pixels() -> None:
    inside = Boxes(*(torch.tensor([value, 0]) for value in (1, 2, 3, 4))).contain(5, 7)
    expected = torch.zeros(2, 5, 7, dtype=torch.bool)
    expected[0, 1:4, 2:6] = True
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)
