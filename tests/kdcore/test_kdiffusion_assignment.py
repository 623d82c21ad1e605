"""Which branch serves which step: the shares for any two counts, and the law of the shuffle."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest
import scipy.stats
import torch

from kdcore.kdiffusion.assignment import Assignment, shares, shuffled

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # thousands of draws

SEED = torch.tensor(20240815)
STEPS_PER_EPOCH = 391  # of CIFAR at a batch of 128


def orders(count: int, draws: int, seed: torch.Tensor = SEED) -> list[tuple[int, ...]]:
    epochs = [number / STEPS_PER_EPOCH for number in range(draws)]
    return [tuple(shuffled(count, seed, epoch).tolist()) for epoch in epochs]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_as_many_branches_as_steps_serve_one_each(count: int) -> None:
    torch.testing.assert_close(shares(count, count), torch.eye(count, dtype=torch.float64))


def test_fewer_branches_serve_consecutive_steps() -> None:
    expected = [[1, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1]]
    torch.testing.assert_close(shares(6, 2), torch.tensor(expected).double())


def test_of_more_branches_a_step_takes_the_mean() -> None:
    expected = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]) / 3
    torch.testing.assert_close(shares(2, 6), expected.double(), rtol=1e-7, atol=0)


def test_a_single_step_takes_the_mean_of_all() -> None:
    torch.testing.assert_close(shares(1, 5), torch.full((1, 5), 0.2, dtype=torch.float64))


@pytest.mark.parametrize(("m", "b"), [(3, 2), (2, 3), (8, 5), (4, 6), (16, 1)])
def test_shares_are_overlaps_of_two_divisions_of_one_interval(m: int, b: int) -> None:
    expected = torch.zeros(m, b, dtype=torch.float64)
    for piece in range(m * b):  # so fine that each piece lies in one step and one branch
        expected[piece // b, piece // m] += m / (m * b)
    torch.testing.assert_close(shares(m, b), expected, rtol=0, atol=1e-15)
    assert bool((shares(m, b).sum(1) - 1).abs().max() < 1e-15)
    torch.testing.assert_close(shares(m, b).sum(0), torch.full((b,), m / b).double())


def test_every_order_is_as_likely_as_any_other() -> None:
    draws = 1500
    counts = Counter(orders(3, draws))
    assert set(counts) == set(permutations(range(3)))
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.01


def test_every_branch_comes_to_every_step_equally_often() -> None:
    draws, count = 1000, 8
    table = torch.zeros(count, count)
    for order in orders(count, draws):
        table[torch.arange(count), list(order)] += 1
    statistic = ((table - draws / count) ** 2 / (draws / count)).sum()
    assert scipy.stats.chi2.sf(float(statistic), df=(count - 1) ** 2) > 0.01


def test_neighbouring_batches_and_seeds_draw_independently() -> None:
    here = torch.tensor(orders(8, 500)).double()
    pairs = {
        "batch": torch.tensor(orders(8, 501)[1:]).double(),
        "seed": torch.tensor(orders(8, 500, SEED + 1)).double(),
    }
    for name, there in pairs.items():
        equal = (here == there).double().mean()  # 1/8 of the places of two random orders
        assert abs(float(equal) - 1 / 8) < 4 * (7 / 64 / 4000) ** 0.5, name


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    first = orders(6, 50)
    torch.rand(17)  # the generator's state does not matter
    assert orders(6, 50) == first
    assert orders(6, 50, SEED + 1) != first


def test_the_words_stay_what_they_were() -> None:  # or runs that are resumed would change
    drawn = [shuffled(6, SEED, epoch).tolist() for epoch in (0.0, 1 / 391, 100.5)]
    assert drawn == [[1, 0, 2, 4, 3, 5], [1, 2, 0, 3, 5, 4], [2, 1, 5, 0, 4, 3]]


def test_the_seed_follows_the_generator_and_is_saved() -> None:
    def seed(of: int) -> Assignment:
        torch.manual_seed(of)
        return Assignment(4, 4, "shuffle")

    assert int(seed(1).seed) == int(seed(1).seed) != int(seed(2).seed)
    resumed = seed(2)
    resumed.load_state_dict(seed(1).state_dict())
    estimates = torch.randn(4, 2, 3, 1)
    for epoch in (0.25, 7.5):
        torch.testing.assert_close(resumed(estimates, epoch), seed(1)(estimates, epoch))


def test_shuffled_estimates_are_those_of_the_branches_in_another_order() -> None:
    estimates, assignment = torch.randn(5, 2, 3, 1), Assignment(5, 5, "shuffle")
    seen = set()
    for number in range(40):
        assigned = assignment(estimates, number / 10)
        matches = (assigned[:, None] == estimates).flatten(2).all(2)
        assert bool((matches.sum(0) == 1).all())
        assert bool((matches.sum(1) == 1).all())
        seen.add(tuple(matches.int().argmax(1).tolist()))
    assert len(seen) > 30  # of 120


def test_in_strict_order_each_branch_keeps_its_step() -> None:
    estimates, assignment = torch.randn(4, 2, 3, 1), Assignment(2, 4, "strict")
    expected = torch.stack([estimates[:2].mean(0), estimates[2:].mean(0)])
    for epoch in (0.0, 0.5):
        torch.testing.assert_close(assignment(estimates, epoch), expected)


def test_shuffled_branches_have_the_same_expected_share_of_every_step() -> None:
    assignment, estimates = Assignment(3, 2, "shuffle"), torch.eye(2)[:, :, None, None]
    total = sum(assignment(estimates, number / 100) for number in range(500)) / 500
    torch.testing.assert_close(total[..., 0, 0], torch.full((3, 2), 0.5), rtol=0, atol=0.1)
