"""Factor transfer: a paraphraser that learns alone, and a translator that follows it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdcore.losses import LOSSES, Term
from kdcore.losses.factors import factor_distance
from kdcore.types import Batch, Outputs, Probe


def built(**params: float) -> tuple[Term, Outputs, Batch]:
    student, teacher = (
        Outputs(torch.randn(3, 5), {"map": torch.randn(3, channels, 4, 4).double()})
        for channels in (3, 5)
    )
    batch = Batch(torch.randn(3, 3, 8, 8), torch.arange(3), torch.arange(3), teacher)
    probe = Probe(student, batch)
    return LOSSES["ft"].build(params, {"map": "map"}, probe).double(), student, batch


def gradients(term: Term, value: Tensor) -> dict[str, Tensor]:
    names, held = zip(*term.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, held), strict=True))


def test_the_distance_of_factors_equals_its_loop() -> None:
    student, teacher = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64)
    expected = 0.0
    for here, there in zip(student.flatten(1), teacher.flatten(1), strict=True):
        rows = (here / here.norm()).tolist(), (there / there.norm()).tolist()
        expected += sum(abs(s - t) for s, t in zip(*rows, strict=True)) / (2 * 12)
    value = factor_distance(student, teacher)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_the_value_is_the_distance_of_factors_and_a_share_of_the_reconstruction_error() -> None:
    term, student, batch = built(rate=0.8, reconstruction_weight=0.1)
    target = batch.teacher.features["map"]
    factor, remade = term.paraphrasers[0](target)
    made = term.maps.connectors[0](student.features["map"])
    assert factor.shape == made.shape == (3, 4, 4, 4)
    expected = factor_distance(made, factor) + 0.1 * (remade - target).abs().mean()
    torch.testing.assert_close(term(student, batch.teacher, batch), expected)


def test_the_paraphraser_learns_from_the_reconstruction_alone() -> None:
    term, student, batch = built()
    both = gradients(term, term(student, batch.teacher, batch))
    target = batch.teacher.features["map"]
    error = (term.paraphrasers[0](target)[1] - target).abs().mean() / 500
    names = [name for name in both if name.startswith("paraphrasers")]
    alone = torch.autograd.grad(error, [term.get_parameter(name) for name in names])
    for name, gradient in zip(names, alone, strict=True):
        torch.testing.assert_close(both[name], gradient, msg=name)


def test_for_the_first_epochs_the_paraphraser_may_learn_alone() -> None:
    term, student, batch = built(paraphraser_epochs=2.0)
    for epoch, follows in ((0.0, False), (1.99, False), (2.0, True)):
        value = term(student, batch.teacher, replace(batch, epoch=epoch))
        found = gradients(term, value)  # one for every parameter: DDP wants it
        moving = {name.split(".")[0] for name, held in found.items() if bool((held != 0).any())}
        assert moving == {"paraphrasers", "maps"} if follows else {"paraphrasers"}
