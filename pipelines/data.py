"""Rows to batches: the order of an epoch, its view, and what the teacher said about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kdcore.types import Batch, Classifier, Mix, Outputs
from pipelines.config import RunConfig
from pipelines.datasets import DataConfig
from pipelines.rows import Rows
from pipelines.sources import Pictures, split, split_rows
from pipelines.views import mixed, mixture, normalised, permutation, view

Fetch = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # row numbers to pixels and labels

# of float pictures made at once: they stay in a core's cache until their batch is used
BYTES_AT_ONCE = 4 * 2**20


@dataclass(frozen=True)
class TeacherRows:
    """A teacher cache, addressed by view and then by row number."""

    logits: Sequence[Rows]  # of each view (N, K)
    features: Mapping[str, Sequence[Rows]]  # layer -> of each view (N, ...)
    classifier: Classifier | None = None

    def outputs(self, number: int, rows: np.ndarray) -> Outputs:
        features = {layer: _tensor(held[number], rows) for layer, held in self.features.items()}
        return Outputs(_tensor(self.logits[number], rows), features, self.classifier)


@dataclass(frozen=True)
class Reader:
    """The batches of one worker of one run: a pure function of the run and the epoch.

    Every worker's rows are its slice of the same batches of the run, so that the union over
    workers does not depend on their number. Rows lie in memory or in files, which makes no
    difference to any batch or its place.

    The last rows of an epoch that fill no batch are left out, others every epoch: a smaller batch
    would weigh its rows more, and could not be shared alike. Evaluation leaves out nothing.
    """

    run: RunConfig
    pictures: Pictures
    teachers: Mapping[str, TeacherRows] = field(default_factory=dict)  # those that are cached
    rank: int = 0
    workers: int = 1
    train_rows: np.ndarray = field(init=False)
    validation_rows: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        train, validation = split(len(self.pictures.label), self.run.data)
        if len(train) < self.run.batch_size and self.run.synthetic is None:
            raise ValueError(
                f"batch_size {self.run.batch_size} is more than the {len(train)} training pictures"
            )
        if len(validation) < self.workers:
            raise ValueError(
                f"{len(validation)} validation pictures are fewer than {self.workers} workers; "
                "raise data.validation"
            )
        object.__setattr__(self, "train_rows", train)
        object.__setattr__(self, "validation_rows", validation)

    @property
    def batches_per_epoch(self) -> int:
        return len(self.train_rows) // self.run.batch_size

    def train(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches, each of ``batch_size / workers`` rows, all in the epoch's view.

        From ``start``, of ``batches_per_epoch``, on: what an epoch that was broken off still lacks.
        """
        views = self.run.data.views
        number = 1 + epoch % views if views else 0
        order = permutation(len(self.train_rows), seed=self.run.seed, epoch=epoch, stream="order")
        rows = self.train_rows[order.numpy()]
        share = self.run.batch_size // self.workers
        starts = [batch * self.run.batch_size for batch in range(start, self.batches_per_epoch)]
        mine = [rows[first + self.rank * share :][:share] for first in starts]
        for first, batch in zip(starts, self._batches(mine, number), strict=True):
            yield replace(batch, epoch=epoch + first / len(rows))

    def validation(self) -> Iterator[Batch]:
        """This worker's share of the validation split, unaugmented."""
        yield from self._unaugmented(self.validation_rows[self.rank :: self.workers])

    def held_out(self, limit: int) -> Iterator[Batch]:
        """The first ``limit`` rows of the validation split, the same for every worker."""
        yield from self._unaugmented(self.validation_rows[:limit])

    def _unaugmented(self, rows: np.ndarray) -> Iterator[Batch]:
        size = self.run.batch_size
        yield from self._batches([rows[at : at + size] for at in range(0, len(rows), size)], 0)

    def _batches(self, rows: Sequence[np.ndarray], number: int) -> Iterator[Batch]:
        """A batch for each array of rows; several are made at once, and then taken apart.

        Small batches would spend their time on calling torch; every row of a batch is a function of
        its own number, so that it does not matter with which others it is made.
        """
        most = max(1, BYTES_AT_ONCE // (self.pictures.image[:1].nbytes * 4))  # of float32 pixels
        together = max(1, most // self.run.batch_size)
        for at in range(0, len(rows), together):
            few = rows[at : at + together]
            batch = self._batch(np.concatenate(few), number)
            ends = np.cumsum([0, *(len(one) for one in few)])
            yield from (_part(batch, slice(*pair)) for pair in pairwise(ends.tolist()))

    def _batch(self, rows: np.ndarray, number: int) -> Batch:
        seen = seen_as(
            self.run.data, _held(self.pictures), rows, number, count=len(self.pictures.label)
        )
        return Batch(
            image=normalised(seen.image, mean=self.run.data.mean, std=self.run.data.std),
            label=seen.label,
            index=torch.from_numpy(rows),
            teachers={label: said.outputs(number, rows) for label, said in self.teachers.items()},
            mix=seen.mix,
        )


def _part(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch, which share its memory."""
    teachers = {
        label: Outputs(
            said.logits[rows],
            {layer: feature[rows] for layer, feature in said.features.items()},
            said.classifier,
        )
        for label, said in batch.teachers.items()
    }
    pictures = (batch.image[rows], batch.label[rows], batch.index[rows])
    mix = None if batch.mix is None else Mix(batch.mix.label[rows], batch.mix.share[rows])
    return Batch(*pictures, teachers=teachers, mix=mix)


@dataclass(frozen=True, slots=True)
class Seen:
    """Some rows as a view shows them, before they are normalised."""

    image: Tensor  # (B, C, H, W) uint8
    label: Tensor  # (B,) int64
    mix: Mix | None  # the other pictures in them, where the view mixes


def view_of(run: RunConfig, pictures: Pictures, rows: np.ndarray, number: int) -> Tensor:
    """Some rows as view ``number`` shows them, uint8: what the teacher and the student both see."""
    return seen_as(run.data, _held(pictures), rows, number, count=len(pictures.label)).image


def seen_as(data: DataConfig, fetch: Fetch, rows: np.ndarray, number: int, *, count: int) -> Seen:
    """Some of ``count`` rows as view ``number`` shows them, with their labels.

    A mixed picture is made of the same view of two training pictures; ``fetch`` is asked for the
    partners too, which are anywhere in the training split.
    """
    image, label, sample = *_fetched(fetch, rows), torch.tensor(rows)
    shown = view(image, sample, number, augment=data.augment, seed=data.view_seed)
    if number == 0 or not data.augment.mixes:
        return Seen(shown, label, None)
    partner = partners(data, number, count=count)[rows]
    other, other_label = _fetched(fetch, partner)
    beside = view(
        other, torch.from_numpy(partner), number, augment=data.augment, seed=data.view_seed
    )
    height, width = image.shape[2:]
    how = mixture(sample, number, size=(height, width), augment=data.augment, seed=data.view_seed)
    return Seen(mixed(shown, beside, how), label, Mix(other_label, how.share))


def partners(data: DataConfig, number: int, *, count: int) -> np.ndarray:
    """For each row the one it is mixed with in a view: a permutation of the training split.

    No row outside the split is another's partner, so that no validation picture is trained on.
    """
    return _partners(count, data.validation, data.split_seed, data.view_seed, number)


@lru_cache(maxsize=2)  # every batch of an epoch asks for the same one
def _partners(
    count: int, validation: float, split_seed: int, view_seed: int, number: int
) -> np.ndarray:
    train, _ = split_rows(count, validation, split_seed)
    order = permutation(len(train), seed=view_seed, epoch=number, stream="partner")
    partner = np.arange(count)
    partner[train] = train[order.numpy()]
    return partner


def whole(run: RunConfig, pictures: Pictures) -> Iterator[Batch]:
    """Every row of a part in order, unaugmented: for the test split."""
    for start in range(0, len(pictures.label), run.batch_size):
        rows = np.arange(start, min(start + run.batch_size, len(pictures.label)))
        image = torch.from_numpy(pictures.image[rows])
        yield Batch(
            image=normalised(image, mean=run.data.mean, std=run.data.std),
            label=torch.from_numpy(pictures.label[rows]),
            index=torch.from_numpy(rows),
        )


def _held(pictures: Pictures) -> Fetch:
    return lambda rows: (pictures.image[rows], pictures.label[rows])


def _fetched(fetch: Fetch, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    image, label = fetch(rows)
    return torch.from_numpy(image), torch.from_numpy(label)


def _tensor(held: Rows, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(held[rows]).float()
