"""DiffKD: DDIM's steps, and which part of the loss teaches what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdcore.losses import LOSSES, Term
from kdcore.losses.ddim import denoised, signal_shares
from kdcore.types import Batch, Outputs, Probe


def built(**params: int) -> tuple[Term, Outputs, Batch]:
    student, teacher = (
        Outputs(torch.randn(3, 5), {"map": torch.randn(3, channels, 4, 4).double()})
        for channels in (3, 6)
    )
    batch = Batch(torch.randn(3, 3, 8, 8), torch.arange(3), torch.arange(3), teacher)
    term = LOSSES["diffkd"].build(params, {"map": "map"}, Probe(student, batch))
    return term.double(), student, batch


def test_the_signal_s_shares_equal_their_loop() -> None:
    shares, share = signal_shares().tolist(), 1.0
    for time in range(1000):
        share *= 1 - (1e-4 + (0.02 - 1e-4) * time / 999)
        assert shares[time] == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5, 500])
def test_steps_with_the_true_noise_give_the_clean_maps(steps: int) -> None:
    clean, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    seen: list[int] = []

    def predict(maps: Tensor, time: Tensor) -> Tensor:
        seen.append(int(time[0]))
        return noise

    shares = signal_shares()
    start = 500 // steps * (steps - 1)
    noisy = shares[start].sqrt() * clean + (1 - shares[start]).sqrt() * noise
    torch.testing.assert_close(denoised(noisy, predict, shares, steps=steps), clean)
    assert seen == list(range(start, -1, -(500 // steps)))


def test_five_steps_are_those_of_the_published_code() -> None:
    seen: list[int] = []

    def predict(maps: Tensor, time: Tensor) -> Tensor:
        seen.append(int(time[0]))
        return torch.zeros_like(maps)

    denoised(torch.randn(1, 1, 1, 1), predict, signal_shares(), steps=5)
    assert seen == [400, 300, 200, 100, 0]


def test_the_compression_is_learned_from_its_own_error_alone() -> None:
    term, student, batch = built()
    (model,) = term.models
    target = batch.teacher.features["map"]
    held = [*model.encode.parameters(), *model.decode.parameters()]
    whole = torch.autograd.grad(term(student, batch.teacher, batch), held)
    error = (model.compress(target)[1] - target).square().mean()
    torch.testing.assert_close(whole, torch.autograd.grad(error, held))


def test_the_student_learns_from_the_distance_of_what_is_refined_alone() -> None:
    term, student, batch = built()
    (model,) = term.models
    maps = student.features["map"].requires_grad_()
    whole = torch.autograd.grad(term(student, batch.teacher, batch), maps)
    projected = term.maps.connectors[0](maps)
    refined = term.refined(projected, model, batch, 0)
    assert refined.shape == (3, 3, 4, 4)  # half of the teacher's channels
    latent = model.compress(batch.teacher.features["map"])[0].detach()
    distance = (refined - latent).square().mean()
    torch.testing.assert_close(whole, torch.autograd.grad(distance, maps))


def test_a_share_of_one_leaves_no_noise_and_of_zero_nothing_else() -> None:
    term, student, batch = built()
    (model,) = term.models
    maps = term.maps.connectors[0](student.features["map"])
    model.judge.weight.data.zero_()
    for bias, follows in ((40.0, "student"), (-40.0, "noise")):
        model.judge.bias.data = torch.tensor([bias, -bias], dtype=torch.float64)
        same = term.refined(maps, model, batch, 0)
        other_noise = term.refined(maps, model, replace(batch, epoch=1.0), 0)
        other_maps = term.refined(maps.flip(1), model, batch, 0)
        fixed, moving = (
            (other_noise, other_maps) if follows == "student" else (other_maps, other_noise)
        )
        torch.testing.assert_close(fixed, same)
        assert bool((moving != same).any())


def test_the_value_changes_with_the_epoch_and_the_seed_and_is_else_the_same() -> None:
    term, student, batch = built()
    value = term(student, batch.teacher, batch)
    torch.testing.assert_close(term(student, batch.teacher, replace(batch, epoch=0.9)), value)
    later = term(student, batch.teacher, replace(batch, epoch=1.0))
    term.seed = 1
    reseeded = term(student, batch.teacher, batch)
    assert len({float(held.detach()) for held in (value, later, reseeded)}) == 3


@pytest.mark.parametrize("steps", [0, 501])
def test_steps_that_do_not_fit_the_times_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be from 1 to 500, got {steps}"):
        built(steps=steps)
