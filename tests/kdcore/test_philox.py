"""Numbers that belong to a sample; the generator's known answers are in test_views.py."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from scipy import stats
from torch import Tensor

from kdcore.philox import normal, philox, uniform

SAMPLES = torch.tensor([3, 70_000, 0, 5])
WHERE = {"epoch": 2.0, "stream": 1, "seed": 7}


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_uniform_numbers_are_the_words_of_sample_epoch_block_and_stream() -> None:
    drawn = uniform(torch.tensor([70_000]), (2, 3), epoch=2.9, stream=1, seed=7 + 2**32)
    words = philox(torch.tensor([[70_000, 2, 0, 1], [70_000, 2, 1, 1]]), (7, 1)).flatten()
    exactly(drawn, ((words[:6].double() + 0.5) / 2**32).reshape(1, 2, 3))


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 2, 2)])
def test_a_sample_draws_the_same_in_any_batch(draw: type, shape: tuple[int, ...]) -> None:
    together = draw(SAMPLES, shape, **WHERE)
    assert together.shape == (4, *shape)
    alone = [draw(SAMPLES[row : row + 1], shape, **WHERE) for row in range(4)]
    exactly(together, torch.cat(alone))


def test_every_sample_epoch_stream_and_seed_draws_other_numbers() -> None:
    others = [WHERE, WHERE | {"epoch": 3.0}, WHERE | {"stream": 0}, WHERE | {"seed": 8}]
    drawn = torch.cat([uniform(SAMPLES, (5,), **where) for where in others])
    assert len(drawn.flatten().unique()) == drawn.numel()


def test_an_epoch_is_one_number_from_its_first_batch_to_its_last() -> None:
    exactly(uniform(SAMPLES, (5,), **WHERE), uniform(SAMPLES, (5,), **WHERE | {"epoch": 2.99}))


def test_numbers_have_their_distributions() -> None:
    # fixed seeds: the probabilities are those of one draw, not of a run in a thousand
    index = torch.arange(500)
    even = uniform(index, (40,), epoch=0.0, stream=0, seed=0)
    assert stats.kstest(even.flatten().numpy(), "uniform").pvalue > 0.01
    bell = normal(index, (40,), epoch=0.0, stream=0, seed=0)
    assert stats.kstest(bell.flatten().numpy(), "norm").pvalue > 0.01
    for first, second in pairwise(bell.unbind(1)):
        assert abs(stats.pearsonr(first.numpy(), second.numpy()).statistic) < 0.2
