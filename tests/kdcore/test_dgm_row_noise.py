"""Noise by row: of the right law, and the same for a row in whatever batch it is drawn."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from kdcore.dgm.distiller import DGMDistiller
from kdcore.dgm.models.helmholtz import helmholtz_generator
from kdcore.dgm.objective import Objective
from kdcore.dgm.row_noise import NoiseLaw, RowNoise

LIKE = torch.zeros((), dtype=torch.float64)


def noise(*rows: int, epoch: int = 0, seed: int = 0, use: int = 0) -> RowNoise:
    return RowNoise(torch.tensor(rows), epoch=epoch, seed=seed, use=use)


@pytest.mark.parametrize(
    ("law", "oracle"),
    [
        ("normal", scipy.stats.norm()),
        ("uniform", scipy.stats.uniform()),
        ("gumbel", scipy.stats.gumbel_r()),
    ],
)
def test_numbers_follow_their_law(law: NoiseLaw, oracle: scipy.stats.rv_continuous) -> None:
    numbers = noise(*range(20)).draw(law, (20, 1000), LIKE)
    assert scipy.stats.kstest(numbers.flatten().numpy(), oracle.cdf).pvalue > 1e-3


def test_a_row_s_numbers_do_not_depend_on_its_batch() -> None:
    whole, half = noise(3, 1, 2, 0), noise(2, 0)
    for shape in ((7,), (40, 40), ()):  # the second needs several blocks
        together = whole.draw("normal", (4, *shape), LIKE)
        alone = half.draw("normal", (2, *shape), LIKE)
        torch.testing.assert_close(alone, together[2:], rtol=0, atol=0)


def test_no_two_draws_share_a_number() -> None:
    source = noise(0, 1)
    seen = [source.draw("uniform", (2, 700), LIKE) for _ in range(4)]
    seen += [
        noise(0, 1, **{name: 1}).draw("uniform", (2, 700), LIKE)
        for name in ("epoch", "seed", "use")
    ]
    numbers = torch.cat(seen).flatten()
    # 9,800 of 2^32 numbers: a shared stream would repeat 700, chance about 0.01
    assert len(numbers.unique()) >= len(numbers) - 2


def test_several_samples_of_a_row_are_all_its_own() -> None:
    several = noise(4, 5).draw("normal", (6, 3), LIKE)
    alone = noise(5).draw("normal", (3, 3), LIKE)
    torch.testing.assert_close(several[3:], alone, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"noise of 2 rows was asked for in the shape \(5, 3\)"):
        noise(4, 5).draw("normal", (5, 3), LIKE)


def test_two_halves_of_a_batch_have_the_loss_of_the_whole() -> None:
    step = DGMDistiller(
        helmholtz_generator(8).double(), helmholtz_generator(2).double(), Objective(), num_noise=3
    )
    whole = step(6, generator=noise(*range(6))).loss
    halves = [step(3, generator=noise(*rows)).loss for rows in ((0, 1, 2), (3, 4, 5))]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-12, atol=0)
