"""Invented pictures as batches: those of the online methods, while their student learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.datafree.draws import rows_of_worker
from kdcore.datafree.measurement import Rounds, answers, picture_metrics
from kdcore.datafree.memory import Pool
from kdcore.datafree.plans import Alternation, EveryEpoch, Offline
from kdcore.datafree.synthesis import Round, Synthesizer
from kdcore.rows import gather_rows
from kdcore.teachers import teacher_outputs
from kdcore.types import Batch

FRESH_BATCHES = 4  # of pictures on which a student is judged
_STOPS = 10  # of a warm-up, at most: its state may hold all pictures so far


@final
class SyntheticBatches:
    """The batches of an online method, each with what the teacher says of its very pictures.

    ``epoch(number)`` invents between batches, against the student as it then is: train on each
    batch before asking for the next. The label is the teacher's choice, the row number that of the
    pool, or of the batch for pictures that are seen once. ``rounds`` are what the last epoch made.

    Of every epoch's round ``held_out`` pictures never reach the student's training; generators that
    learn on make others to judge it by.
    State is taken and loaded between epochs, and where ``warm_up`` stops. Raises ValueError for a
    method whose pictures are made before any student (``transfer_set``).
    """

    def __init__(
        self, synthesizer: Synthesizer, *, label: str = "teacher", held_out: int = 0
    ) -> None:
        schedule = synthesizer.method.schedule
        if isinstance(schedule, Offline):
            raise ValueError(
                "this method makes a transfer set before any student: transfer_set() writes it"
            )
        self.synthesizer, self.label, self.schedule = synthesizer, label, schedule
        method, like = synthesizer.method, synthesizer.like
        self.pool, self.held = (
            Pool(synthesizer.shape, limit=method.pool_limit, device=like.device) for _ in range(2)
        )
        self.held_out = held_out
        self.rounds = Rounds()

    @property
    def batches_per_epoch(self) -> int:
        return self.schedule.batches_per_epoch

    def warm_up(self) -> Iterator[None]:
        """Make the rounds before the student's first step; ``epoch`` makes what is lacking of them.

        Stops now and then, all workers at once, where state may be taken. What the rounds measure
        is the first epoch's.
        """
        between = max(self.schedule.rounds_per_epoch, -(-self.schedule.warmup // _STOPS))
        while self.synthesizer.rounds < self.schedule.warmup:
            self._invent()
            if self.synthesizer.rounds % between == 0:
                yield

    def epoch(self, number: int) -> Iterator[Batch]:
        """The epoch's batches, of this worker's share of rows each."""
        for _ in self.warm_up():
            pass
        if self.synthesizer.rounds > self.schedule.warmup:
            self.rounds = Rounds()
        if isinstance(self.schedule, EveryEpoch):
            batches = self._from_pool(self.schedule)
        else:
            batches = self._alternating(self.schedule)
        for step, batch in enumerate(batches):
            yield replace(batch, epoch=number + step / self.batches_per_epoch)

    def _invent(self) -> Round:
        made = self.synthesizer.round()
        self.rounds.add(made)
        if isinstance(self.schedule, EveryEpoch) or self.schedule.replay:
            stored = gather_rows(self.synthesizer.normalisation.stored(made.image))
            held_out = self.held_out if isinstance(self.schedule, EveryEpoch) else 0
            self.held.add(stored[:held_out])
            self.pool.add(stored[held_out:])
        return made

    def held_out_batches(self) -> Iterator[Batch]:
        """Pictures that the student was never trained on.

        They are those that were kept out of the pool, and of generators that learn on fresh ones.
        """
        if isinstance(self.schedule, Alternation):
            for _ in range(FRESH_BATCHES):
                yield self._batch(self.synthesizer.sample())
            return
        device, dtype = self.held.stored.device, self.synthesizer.like.dtype
        size = self.schedule.batch_size
        for start in range(0, len(self.held), size):
            rows = torch.arange(start, min(start + size, len(self.held)), device=device)
            image = self.held.pictures(rows, self.synthesizer.normalisation, dtype)
            yield self._batch(image, rows)

    def metrics(self) -> dict[str, float]:
        """Of the last epoch's rounds: losses, and of the last pictures what the teacher says."""
        if self.rounds.last is None:
            return {}
        said = answers(self.synthesizer.teacher, [self.rounds.last.image])
        return self.rounds.metrics | picture_metrics(said)

    def _from_pool(self, schedule: EveryEpoch) -> Iterator[Batch]:
        self._invent()
        for _ in range(schedule.student_steps):
            yield self._pooled(schedule.student_batch_size)

    def _alternating(self, schedule: Alternation) -> Iterator[Batch]:
        for _ in range(schedule.rounds):
            made = self._invent()
            shared: Batch | None = None
            before = (self.synthesizer.rounds - 1) * schedule.student_steps
            for step in range(before, before + schedule.student_steps):
                if schedule.replay and step % 2:
                    yield self._pooled(schedule.batch_size)
                    continue
                if schedule.student_sees == "fresh":
                    yield self._batch(self.synthesizer.sample())
                    continue
                shared = shared or self._batch(self._again(schedule, made))
                yield shared

    def _again(self, schedule: Alternation, made: Round) -> Tensor:
        if schedule.student_sees == "same_pictures":
            return made.image
        return self.synthesizer.again()

    def _pooled(self, count: int) -> Batch:
        method, draw = self.synthesizer.method, self.synthesizer.draw()
        draw = replace(draw, row=rows_of_worker(count, draw.row.device))
        rows, normalisation = self.pool.draw(draw), self.synthesizer.normalisation
        image = self.pool.pictures(rows, normalisation, self.synthesizer.like.dtype)
        return self._batch(method.student_view(image, draw, normalisation), rows)

    def _batch(
        self, image: Float[Tensor, "b c h w"], index: Int[Tensor, " b"] | None = None
    ) -> Batch:
        said = teacher_outputs(self.synthesizer.teacher, image)
        if index is None:
            index = rows_of_worker(self.schedule.batch_size, image.device)
        label = said.logits.argmax(dim=1)
        return Batch(image, label, index, teacher=said, teachers={self.label: said})

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, but for the student."""
        return {
            "synthesizer": self.synthesizer.state_dict(),
            "pool": self.pool.state_dict(),
            "held": self.held.state_dict(),
            "rounds": self.rounds.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.synthesizer.load_state_dict(state["synthesizer"])
        self.pool.load_state_dict(state["pool"])
        self.held.load_state_dict(state["held"])
        self.rounds.load_state_dict(state["rounds"])
