"""Contrast with and without a memory: scores by loops, what is remembered and what is drawn."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.losses import LOSSES
from kdcore.losses.bank import MemoryContrast
from kdcore.losses.contrast import in_batch_contrast, info_nce, noise_contrast
from kdcore.types import Batch, Outputs, Probe

EMBEDDING = {"embedding": "embedding"}
NUM_ROWS = 9


def outputs(width: int) -> Outputs:
    return Outputs(torch.zeros(3, 2), {"embedding": torch.randn(3, width, dtype=torch.float64)})


@pytest.fixture
def student() -> Outputs:
    return outputs(4)


@pytest.fixture
def batch() -> Batch:
    label = torch.tensor([0, 1, 1])
    return Batch(torch.zeros(3, 1, 1, 1), label, torch.tensor([5, 0, 7]), outputs(6))


def make_term(student: Outputs, batch: Batch, seed: int = 0, **params: Any) -> MemoryContrast:
    """A term whose one bank has nine rows, of which five are a step's noise."""
    torch.manual_seed(seed)
    params = {"dim": 3, "num_negatives": 5, "temperature": 0.5, **params}
    return MemoryContrast(EMBEDDING, Probe(student, batch, NUM_ROWS), **params).double()


def drawn(term: MemoryContrast) -> list[int]:
    """The noise of the next step, without taking the step."""
    generator = torch.Generator()
    generator.set_state(term.banks[0].random_state)
    return torch.randperm(NUM_ROWS, generator=generator)[:5].tolist()


@torch.no_grad()
def embedded(student: Outputs, batch: Batch, term: MemoryContrast) -> tuple[Tensor, Tensor]:
    assert batch.teacher is not None
    (bank,) = term.banks
    here = F.normalize(bank.embed_student(student.features["embedding"]))
    return here, F.normalize(bank.embed_teacher(batch.teacher.features["embedding"]))


def nce(anchor: Tensor, bank: Tensor, noise: list[list[int]], own: list[int], z: float) -> float:
    total = 0.0
    for row, others, at in zip(anchor, noise, own, strict=True):
        c = len(others) / NUM_ROWS
        x = exp(float(row @ bank[at]) / 0.5) / z
        total -= log(x / (x + c + 1e-7))
        for k in others:
            x = exp(float(row @ bank[k]) / 0.5) / z
            total -= log(c / (x + c + 1e-7))
    return total / len(own)


def test_a_step_equals_its_loop(student: Outputs, batch: Batch) -> None:
    term = make_term(student, batch)
    term(student, batch.teacher, batch)  # so that three rows have labels and Z is fixed
    moved = Batch(batch.image, batch.label, torch.tensor([0, 1, 2]), batch.teacher)
    classes = {5: 0, 0: 1, 7: 1}
    own, label = [0, 1, 2], batch.label.tolist()
    noise = [
        [k for k in drawn(term) if k != at and classes.get(k) != y]
        for at, y in zip(own, label, strict=True)
    ]
    assert any(len(others) < 5 for others in noise)
    here, there = embedded(student, batch, term)
    (bank,) = term.banks
    expected = nce(here, bank.teacher, noise, own, float(bank.normalisers[0]))
    expected += nce(there, bank.student, noise, own, float(bank.normalisers[1]))
    value = term(student, batch.teacher, moved)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_a_step_moves_the_rows_of_the_batch_and_no_others(student: Outputs, batch: Batch) -> None:
    term = make_term(student, batch)
    (bank,), index = term.banks, batch.index.tolist()
    before = copy.deepcopy(bank)
    term(student, batch.teacher, batch)
    for name, seen in zip(("student", "teacher"), embedded(student, batch, term), strict=True):
        expected = getattr(before, name).clone()
        for row, at in zip(seen, index, strict=True):
            moved = (expected[at] + row) / 2
            expected[at] = moved / moved.norm()
        torch.testing.assert_close(getattr(bank, name), expected)
    assert bank.label.tolist() == [1, -1, -1, -1, -1, 0, -1, 1, -1]


def test_the_normalisers_are_those_of_the_first_batch(student: Outputs, batch: Batch) -> None:
    term = make_term(student, batch)
    (bank,), noise = term.banks, drawn(term)
    here, _ = embedded(student, batch, term)
    scores = [
        exp(float(row @ bank.teacher[k]) / 0.5)
        for row, at in zip(here, batch.index.tolist(), strict=True)
        for k in (at, *noise)
    ]
    term(student, batch.teacher, batch)
    first = bank.normalisers.clone()
    expected = torch.tensor(NUM_ROWS * sum(scores) / len(scores), dtype=torch.float64)
    torch.testing.assert_close(first[0], expected)
    term(student, batch.teacher, batch)
    torch.testing.assert_close(bank.normalisers, first, rtol=0, atol=0)


def test_evaluation_remembers_nothing(student: Outputs, batch: Batch) -> None:
    term = make_term(student, batch).eval()
    before = copy.deepcopy(term.state_dict())
    value = term(student, batch.teacher, batch)
    torch.testing.assert_close(dict(term.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close(term(student, batch.teacher, batch), value, rtol=0, atol=0)


def test_a_resumed_run_goes_on_with_the_same_draws(student: Outputs, batch: Batch) -> None:
    straight, other = make_term(student, batch, seed=1), make_term(student, batch, seed=2)
    assert drawn(straight) != drawn(other)
    straight(student, batch.teacher, batch)
    other.load_state_dict(straight.state_dict())
    for _ in range(2):
        expected = straight(student, batch.teacher, batch)
        torch.testing.assert_close(other(student, batch.teacher, batch), expected, rtol=0, atol=0)
    state: Mapping[str, Tensor] = straight.state_dict()
    torch.testing.assert_close(dict(other.state_dict()), dict(state), rtol=0, atol=0)


def test_every_step_draws_other_noise(student: Outputs, batch: Batch) -> None:
    term, draws = make_term(student, batch), set()
    for _ in range(5):
        draws.add(tuple(drawn(term)))
        term(student, batch.teacher, batch)
    assert len(draws) == 5


def test_a_bank_smaller_than_its_noise_is_scored_whole(student: Outputs, batch: Batch) -> None:
    values = []
    for seed in (1, 2):
        term = make_term(student, batch, num_negatives=NUM_ROWS)
        term.banks[0].random_state.copy_(torch.Generator().manual_seed(seed).get_state())
        values.append(term(student, batch.teacher, batch))
    torch.testing.assert_close(values[0], values[1])


def test_training_learns_to_tell_a_row_s_teacher(student: Outputs, batch: Batch) -> None:
    term = make_term(student, batch)
    optimizer = torch.optim.SGD(term.parameters(), lr=0.1)
    values = []
    for _ in range(60):
        value = term(student, batch.teacher, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-10:]) < 0.8 * sum(values[:10])


def test_a_bank_needs_the_number_of_rows(student: Outputs, batch: Batch) -> None:
    with pytest.raises(ValueError, match=r"number of rows is unknown.*use infonce"):
        LOSSES["crd"].build({}, EMBEDDING, Probe(student, batch))


def test_without_noise_there_is_nothing_to_tell_apart() -> None:
    positive, noise = torch.tensor([0.5, 2.0]), torch.ones(2, 3)
    value = noise_contrast(positive, noise, torch.zeros(2, 3, dtype=torch.bool), num_rows=3)
    torch.testing.assert_close(value, torch.zeros(()), rtol=0, atol=1e-5)


def test_in_batch_contrast_equals_its_loop() -> None:
    student, teacher = torch.randn(2, 4, 3, dtype=torch.float64)
    expected = 0.0
    for i in range(4):
        cosines = [float(torch.cosine_similarity(student[i], t, dim=0)) for t in teacher]
        expected -= log(exp(cosines[i] / 0.2) / sum(exp(c / 0.2) for c in cosines)) / 4
    value = in_batch_contrast(student, teacher, temperature=0.2)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_in_batch_contrast_is_that_with_the_others_as_negatives() -> None:
    student, teacher = (F.normalize(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2))
    alone = [
        info_nce(
            student[i : i + 1],
            teacher[i : i + 1],
            torch.cat([teacher[:i], teacher[i + 1 :]]),
            temperature=0.07,
        )
        for i in range(4)
    ]
    torch.testing.assert_close(in_batch_contrast(student, teacher), torch.stack(alone).mean())
