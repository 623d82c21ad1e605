"""Masked generation: masks of a picture's own, and the generator behind them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kdcore.losses import LOSSES, Term
from kdcore.types import Batch, Outputs, Probe


def built(rows: int = 3, **params: object) -> tuple[Term, Outputs, Batch]:
    student, teacher = (
        Outputs(torch.randn(rows, 5), {"map": torch.randn(rows, channels, 4, 4).double()})
        for channels in (3, 5)
    )
    index = torch.arange(rows) * 7
    batch = Batch(torch.randn(rows, 3, 8, 8), index % 5, index, teacher)
    term = LOSSES["mgd"].build(params, {"map": "map"}, Probe(student, batch))
    return term.double(), student, batch


@pytest.mark.parametrize("mask", ["channels", "positions"])
def test_the_value_is_that_of_its_parts(mask: str) -> None:
    term, student, batch = built(mask=mask, ratio=0.5)
    target = batch.teacher.features["map"]
    projected = term.maps.connectors[0](student.features["map"])
    keep = term.drawn_mask(projected, batch, stream=0)
    assert keep.shape == ((3, 5, 1, 1) if mask == "channels" else (3, 1, 4, 4))
    assert set(keep.flatten().tolist()) == {0.0, 1.0}
    difference = term.generators[0](projected * keep) - target
    expected = sum(float(held.square().sum()) for held in difference.detach()) / 3
    value = term(student, batch.teacher, batch)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_nothing_is_masked_at_ratio_zero() -> None:
    term, student, batch = built(ratio=0.0)
    target = batch.teacher.features["map"]
    generated = term.generators[0](term.maps.connectors[0](student.features["map"]))
    expected = (generated - target).square().sum() / 3
    torch.testing.assert_close(term(student, batch.teacher, batch), expected)


@pytest.mark.parametrize("mask", ["channels", "positions"])
def test_the_masked_share_is_the_ratio(mask: str) -> None:
    term, _, batch = built(rows=400, mask=mask, ratio=0.3)
    keep = term.drawn_mask(torch.zeros(400, 8, 4, 4), batch, stream=0)
    assert abs(float(keep.mean()) - 0.7) < 0.02


def test_masks_change_with_the_epoch_the_seed_and_the_layer_and_nothing_else() -> None:
    term, student, batch = built(rows=50, ratio=0.5)
    maps = student.features["map"]
    mask = term.drawn_mask(maps, batch, stream=0)
    other, _, _ = built(rows=50, ratio=0.5, seed=1)
    for changed in (
        term.drawn_mask(maps, replace(batch, epoch=1.0), stream=0),
        term.drawn_mask(maps, batch, stream=1),
        other.drawn_mask(maps, batch, stream=0),
    ):
        assert bool((changed != mask).any())
    rows = torch.tensor([31, 4])
    # another batch of the same epoch
    few = Batch(batch.image[rows], batch.label[rows], batch.index[rows], epoch=0.9)
    torch.testing.assert_close(term.drawn_mask(maps[rows], few, stream=0), mask[rows])


def test_a_ratio_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ratio, the share left out, must be in \[0, 1\), got 1"):
        built(ratio=1.0)
