"""Online methods as batches: what they carry, and that a broken-off run goes on."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdcore.datafree.batches import SyntheticBatches
from kdcore.datafree.learning import published_step
from kdcore.datafree.measurement import Rounds
from kdcore.datafree.plans import Alternation, Offline
from kdcore.datafree.predictions import class_shares
from kdcore.datafree.presets import PRESETS
from kdcore.datafree.synthesis import Synthesizer
from kdcore.datafree.transfer import shard_seed, transfer_set
from kdcore.step import DistillStep
from tests.kdcore.datafree_toys import (
    BATCH,
    LAYERS,
    NORMALISATION,
    NUM_CLASSES,
    SHAPE,
    new_student,
    real_records,
    toy,
    trained_teacher,
)

ONLINE = [name for name, one in PRESETS.items() if not isinstance(one.schedule, Offline)]


class Run:
    """A student, its synthesizer and its optimiser, which can be written down and taken up."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(1)
        teacher, student = trained_teacher(), new_student()
        made = Synthesizer(
            teacher, toy(name), shape=SHAPE, normalisation=NORMALISATION, students=[student]
        )
        self.batches = SyntheticBatches(made, label="big")
        self.step: DistillStep = published_step(
            PRESETS[name], student, teacher, shape=SHAPE, layers=LAYERS
        )
        self.optimizer = torch.optim.Adam(self.step.parameters(), 0.01)

    def epoch(self, number: int) -> list[float]:
        losses = []
        for batch in self.batches.epoch(number):
            self.optimizer.zero_grad()
            result = self.step.train()(batch)
            result.loss.backward()
            self.optimizer.step()
            losses.append(float(result.loss.detach()))
        return losses

    def parts(self):  # type: ignore[no-untyped-def]
        return {"batches": self.batches, "step": self.step, "optimizer": self.optimizer}


@pytest.mark.parametrize("name", ONLINE)
def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not(name: str) -> None:
    whole, first, second = Run(name), Run(name), Run(name)
    expected = [whole.epoch(number) for number in range(3)]
    assert [first.epoch(number) for number in range(2)] == expected[:2]
    written = io.BytesIO()
    torch.save({key: part.state_dict() for key, part in first.parts().items()}, written)
    written.seek(0)
    read = torch.load(written, weights_only=True)
    for key, part in second.parts().items():
        part.load_state_dict(read[key])
    assert second.epoch(2) == expected[2]


@pytest.mark.parametrize(("warmup", "stops"), [(0, 0), (3, 3), (25, 8)])
def test_a_warm_up_stops_ten_times_at_most_and_counts_to_the_first_epoch(
    warmup: int, stops: int
) -> None:
    batches = Run("fast").batches
    batches.schedule = replace(batches.schedule, warmup=warmup)
    assert sum(1 for _ in batches.warm_up()) == stops
    counts = []
    for number in range(2):
        list(batches.epoch(number))
        counts.append(batches.rounds.count)
    assert counts == [warmup + 1, 1]


def test_a_batch_carries_what_the_teacher_says_of_its_very_pictures() -> None:
    run = Run("fast")
    teacher = run.batches.synthesizer.teacher
    for number, batch in enumerate(run.batches.epoch(4)):
        said = batch.teachers["big"]
        assert batch.teacher is said
        torch.testing.assert_close(said.logits, teacher(batch.image).logits.detach())
        torch.testing.assert_close(batch.label, said.logits.argmax(dim=1))
        assert set(LAYERS) <= set(said.features)
        assert batch.epoch == pytest.approx(4 + number / run.batches.batches_per_epoch)


def images_of(name: str, **changes: object) -> list[Tensor]:
    run = Run(name)
    method = run.batches.synthesizer.method
    assert isinstance(method.schedule, Alternation)
    schedule = replace(method.schedule, student_steps=2, rounds=1, warmup=0, **changes)  # type: ignore[arg-type]
    run.batches.schedule = schedule
    images = [batch.image for batch in run.batches.epoch(0)]
    assert run.batches.rounds.last is not None
    return [*images, run.batches.rounds.last.image]


def test_the_student_sees_fresh_pictures_or_those_of_the_generator_s_step() -> None:
    first, second, _ = images_of("dfq", student_sees="fresh")
    assert float((first - second).abs().max()) > 0.1
    # the step has moved the generator: the same latents are other pictures
    first, second, made = images_of("zskt", student_sees="same_latents")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert float((first - made).abs().max()) > 0
    first, second, _ = images_of("dafl", student_sees="same_pictures")
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_dafl_s_student_sees_the_pictures_that_the_generator_was_judged_by() -> None:
    run = Run("dafl")
    made = run.batches.synthesizer
    seen: list[Tensor] = []
    made.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    batch = next(iter(run.batches.epoch(0)))
    torch.testing.assert_close(seen[0], batch.image, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lopes", "zskd", "soft_target", "deepinversion"])
def test_pictures_come_to_be_what_was_asked_of_every_class(name: str) -> None:
    teacher = trained_teacher()
    method = toy(name)
    schedule = replace(method.schedule, steps=60)
    images = replace(method.images, lr=0.1)
    made = transfer_set(
        teacher,
        replace(method, schedule=schedule, images=images),
        shape=SHAPE,
        normalisation=NORMALISATION,
        count=BATCH,
        seed=0,
        records=real_records(teacher),
    )
    assert made.metrics["loss_last"] < 0.7 * made.metrics["loss_first"]
    assert float(class_shares(made.logits).min()) >= 0.02


def above_least(parts: Mapping[str, float]) -> float:
    """DAFL's loss without the activations, above the least that it can be."""
    return parts["one_hot"] + 5 * (parts["balance"] + math.log10(NUM_CLASSES))


def test_dafl_s_generator_comes_to_make_every_class() -> None:
    method = toy("dafl")
    made = Synthesizer(
        trained_teacher(),
        replace(method, images=replace(method.images, lr=0.02)),
        shape=SHAPE,
        normalisation=NORMALISATION,
    )
    rounds = [made.round() for _ in range(100)]
    first, last = (above_least(one.parts) for one in (rounds[0], rounds[-1]))
    assert last < 0.7 * first
    shares = class_shares(made.teacher(made.sample()).logits)
    assert float(shares.min()) >= 0.02


def test_an_epoch_keeps_no_pictures_but_the_last() -> None:
    run = Run("zskt")
    run.epoch(0)
    rounds = run.batches.rounds
    assert rounds.count == 3
    assert rounds.last is not None
    assert rounds.last.image.shape == (BATCH, *SHAPE)
    told = [run.batches.synthesizer.round() for _ in range(2)]
    mean = sum(one.parts["disagreement"] for one in told) / 2
    again = Rounds()
    for one in told:
        again.add(one)
    assert again.metrics["part/disagreement"] == pytest.approx(mean)
    assert again.metrics["loss_last"] == pytest.approx(mean)


def test_the_metrics_of_an_epoch_are_of_its_last_pictures() -> None:
    run = Run("fast")
    assert run.batches.metrics() == {}
    run.epoch(0)
    metrics = run.batches.metrics()
    shares = [metrics[f"share/{number}"] for number in range(NUM_CLASSES)]
    assert sum(shares) == pytest.approx(1)
    assert metrics["statistics"] > 0
    assert metrics["part/class"] > 0


def test_pictures_that_are_held_out_stay_out_of_the_pool() -> None:
    run = Run("fast")
    run.batches.held_out = 8
    run.epoch(0)
    rounds = run.batches.synthesizer.rounds
    held, pool = run.batches.held.stored, run.batches.pool.stored
    assert (len(held), len(pool)) == (8 * rounds, (BATCH - 8) * rounds)
    assert not {bytes(one.numpy()) for one in held} & {bytes(one.numpy()) for one in pool}
    batches = list(run.batches.held_out_batches())
    assert sum(len(batch.label) for batch in batches) == len(held)


def test_a_generator_s_student_is_judged_on_pictures_of_new_latents() -> None:
    run = Run("dfq")
    trained = torch.cat([batch.image for batch in run.batches.epoch(0)]).flatten(1)
    judged = torch.cat([batch.image for batch in run.batches.held_out_batches()]).flatten(1)
    assert float(torch.cdist(judged, trained).min()) > 0.01


def test_shards_of_seeds_are_all_different() -> None:
    seeds = {shard_seed(seed, shard) for seed in range(4) for shard in range(4)}
    assert len(seeds) == 16
    with pytest.raises(ValueError, match="32 bits"):
        shard_seed(1 << 32, 0)
