"""Every published method, at the size of a test, from noise to a student."""

from __future__ import annotations

import pytest
import torch

from kdcore.datafree.batches import SyntheticBatches
from kdcore.datafree.learning import published_step
from kdcore.datafree.plans import Offline
from kdcore.datafree.presets import PRESETS
from kdcore.datafree.synthesis import Synthesizer
from kdcore.datafree.transfer import transfer_set
from tests.kdcore.datafree_toys import (
    BATCH,
    LAYERS,
    NORMALISATION,
    SHAPE,
    accuracy,
    digest,
    learn,
    new_student,
    real_records,
    stored_batches,
    toy,
    trained_teacher,
)

OFFLINE = [name for name, method in PRESETS.items() if isinstance(method.schedule, Offline)]
ONLINE = [name for name in PRESETS if name not in OFFLINE]


def test_the_teacher_of_the_tests_is_a_teacher() -> None:
    assert accuracy(trained_teacher()) > 0.95


@pytest.mark.parametrize("name", OFFLINE)
def test_an_offline_method_trains_a_student_and_leaves_its_teacher(name: str) -> None:
    teacher, student = trained_teacher(), new_student()
    before = digest(teacher)
    made = transfer_set(
        teacher,
        toy(name),
        shape=SHAPE,
        normalisation=NORMALISATION,
        count=2 * BATCH,
        seed=0,
        records=real_records(teacher) if name == "lopes" else None,
    )
    step = published_step(PRESETS[name], student, teacher, shape=SHAPE, layers=LAYERS)
    epochs = [learn(step, stored_batches(made.image, made.label, teacher)) for _ in range(6)]
    assert sum(epochs[-1]) < sum(epochs[0])
    assert digest(teacher) == before
    assert all(held.grad is None for held in teacher.parameters())
    if name != "noise":
        assert made.metrics["loss_last"] < made.metrics["loss_first"]


@pytest.mark.parametrize("name", ONLINE)
def test_an_online_method_trains_a_student_and_leaves_its_teacher(name: str) -> None:
    teacher, student = trained_teacher(), new_student()
    before = digest(teacher)
    step = published_step(PRESETS[name], student, teacher, shape=SHAPE, layers=LAYERS)
    made = Synthesizer(
        teacher, toy(name), shape=SHAPE, normalisation=NORMALISATION, students=[student]
    )
    batches = SyntheticBatches(made)
    first = digest(student)
    for epoch in range(3):
        losses = learn(step, batches.epoch(epoch))
        assert len(losses) == batches.batches_per_epoch
    assert all(torch.isfinite(torch.tensor(losses)))
    assert digest(student) != first
    assert digest(teacher) == before
    assert all(held.grad is None for held in teacher.parameters())
