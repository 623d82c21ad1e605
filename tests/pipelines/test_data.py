"""Batches are a pure function of run, epoch and row, however many workers share them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcore.types import Batch
from pipelines.config import RunConfig
from pipelines.data import Reader, TeacherRows, view_of, whole
from pipelines.rows import FileRows, RowsWriter
from pipelines.sources import Pictures
from pipelines.strict import validated
from pipelines.views import normalised, view

COUNT, VIEWS = 75, 3  # 60 of them train: 7 batches of 8 and 4 rows over

PICTURES = Pictures(
    np.random.default_rng(0).integers(0, 256, (COUNT, 2, 4, 5), dtype=np.uint8),
    np.arange(COUNT) % 5,
    5,
)
# every number tells its view and row; float16 holds whole numbers up to 2,048
_NUMBERS = (100 * np.arange(VIEWS + 1)[:, None] + np.arange(COUNT)).astype(np.float16)
TEACHER = TeacherRows(
    np.stack([_NUMBERS, -_NUMBERS], axis=-1),
    {"embedding": _NUMBERS[..., None] * np.ones((1, 3), np.float16)},
)


def run_of(**changes: Any) -> RunConfig:
    content: dict[str, Any] = {
        "student": {"name": "convnet"},
        "data": {"name": "digits", "validation": 0.2, "views": VIEWS},
        "epochs": 4,
        "batch_size": 8,
        "losses": {"ce": {}},
    }
    content["data"] |= {"augment": {"crop": 1, "flip": True}, "mean": [0.4, 0.5], "std": [0.2, 0.3]}
    content["data"] |= changes.pop("data", {})
    return validated(RunConfig, content | deepcopy(changes), where="toy")


CACHED = {"teacher": TEACHER}


def reader_of(rank: int = 0, workers: int = 1, **changes: Any) -> Reader:
    return Reader(run_of(**changes), PICTURES, CACHED, rank=rank, workers=workers)


def rows_of(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.index.tolist()]


def teacher_numbers(batch: Batch) -> list[float]:
    return batch.teachers["teacher"].logits[:, 0].tolist()


def exactly(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("workers", [2, 4])
def test_the_workers_batches_together_are_one_worker_s(workers: int) -> None:
    shares = [list(reader_of(rank, workers).train(1)) for rank in range(workers)]
    alone = list(reader_of().train(1))
    assert len(alone) == len(shares[0]) == 7
    for number, batch in enumerate(alone):
        parts = [share[number] for share in shares]
        assert {len(part.label) for part in parts} == {8 // workers}
        for name in ("image", "label", "index"):
            exactly(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        assert [one for part in parts for one in teacher_numbers(part)] == teacher_numbers(batch)


def test_the_workers_validation_rows_together_are_all_of_them() -> None:
    alone = rows_of(list(reader_of().validation()))
    shares = [rows_of(list(reader_of(rank, 2).validation())) for rank in range(2)]
    assert alone == reader_of().validation_rows.tolist()
    assert sorted(shares[0] + shares[1]) == alone
    assert abs(len(shares[0]) - len(shares[1])) <= 1


def test_an_epoch_is_the_same_every_time_and_every_epoch_differs() -> None:
    first, again = (list(reader_of().train(2)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        exactly(one.image, other.image)
        exactly(one.index, other.index)
    orders = [tuple(rows_of(list(reader_of().train(epoch)))) for epoch in range(6)]
    orders += [tuple(rows_of(list(reader_of(seed=1).train(0))))]
    assert len(set(orders)) == 7


def test_the_last_incomplete_batch_is_left_out_and_all_rows_train_in_time() -> None:
    reader, seen = reader_of(), set()
    assert (len(reader.train_rows), reader.batches_per_epoch) == (60, 7)
    for epoch in range(8):
        batches = list(reader.train(epoch))
        assert [len(batch.label) for batch in batches] == [8] * 7
        rows = rows_of(batches)
        assert len(set(rows)) == 56
        seen |= set(rows)
    assert seen == set(reader.train_rows.tolist())


def test_validation_rows_are_never_trained() -> None:
    reader = reader_of()
    trained = {row for epoch in range(10) for row in rows_of(list(reader.train(epoch)))}
    assert trained.isdisjoint(reader.validation_rows.tolist())
    assert trained | set(reader.validation_rows.tolist()) == set(range(COUNT))
    assert len(reader.validation_rows) == 15


@pytest.mark.parametrize(
    ("views", "numbers"), [(3, [1, 2, 3, 1, 2, 3, 1]), (1, [1, 1, 1]), (0, [0, 0, 0])]
)
def test_every_epoch_shows_the_next_view(views: int, numbers: list[int]) -> None:
    reader = reader_of(data={"views": views} if views else {"views": 0, "augment": {}})
    for epoch, number in enumerate(numbers):
        for batch in reader.train(epoch):
            pixels = torch.from_numpy(PICTURES.image[batch.index.numpy()])
            seen = view(pixels, batch.index, number, augment=reader.run.data.augment, seed=0)
            exactly(batch.image, normalised(seen, mean=(0.4, 0.5), std=(0.2, 0.3)))
            assert teacher_numbers(batch) == [100 * number + row for row in batch.index.tolist()]


def test_the_view_seed_and_not_the_seed_makes_the_view() -> None:
    rows = np.arange(20)
    seen, same, other = (
        view_of(run_of(**changes), PICTURES, rows, 2)
        for changes in ({}, {"seed": 5}, {"data": {"view_seed": 5}})
    )
    exactly(seen, same)
    assert bool((seen != other).any())


def test_teacher_rows_line_up_with_row_and_view() -> None:
    for epoch in range(4):
        for batch in reader_of().train(epoch):
            said = batch.teachers["teacher"]
            number = torch.tensor(
                [100.0 * (1 + epoch % 3) + row for row in batch.index.tolist()], dtype=torch.float32
            )
            exactly(said.logits, torch.stack([number, -number], dim=1))
            exactly(said.features["embedding"], number[:, None].expand(-1, 3))
            exactly(batch.label, batch.index % 5)
    for batch in reader_of().validation():
        assert teacher_numbers(batch) == batch.index.tolist()


def test_without_teacher_rows_a_batch_has_no_teacher() -> None:
    batch = next(Reader(run_of(), PICTURES).train(0))
    assert (batch.teacher, dict(batch.teachers)) == (None, {})


@pytest.mark.parametrize("rows", ["validation", "whole"])
def test_evaluation_sees_every_picture_as_it_is(rows: str) -> None:
    run = run_of()
    batches = list(reader_of().validation() if rows == "validation" else whole(run, PICTURES))
    expected = split_rows = list(range(COUNT))
    if rows == "validation":
        expected = split_rows = reader_of().validation_rows.tolist()
    assert rows_of(batches) == expected
    assert max(len(batch.label) for batch in batches) == 8
    image = normalised(
        torch.from_numpy(PICTURES.image[split_rows]), mean=(0.4, 0.5), std=(0.2, 0.3)
    )
    exactly(torch.cat([batch.image for batch in batches]), image)
    exactly(torch.cat([batch.label for batch in batches]), torch.tensor(expected) % 5)


def test_arrays_that_may_not_be_written_are_read() -> None:
    # as Ray's object store holds them; torch warns about such memory, and a warning is an error
    image, label = PICTURES.image.copy(), PICTURES.label.copy()
    logits, feature = TEACHER.logits.copy(), TEACHER.features["embedding"].copy()
    for array in (image, label, logits, feature):
        array.flags.writeable = False
    teacher = TeacherRows(logits, {"embedding": feature})
    reader = Reader(run_of(), Pictures(image, label, 5), {"teacher": teacher})
    for batch in [
        next(reader.train(0)),
        next(reader.validation()),
        next(whole(reader.run, PICTURES)),
    ]:
        batch.image.zero_()
        batch.label.zero_()
    exactly(next(reader.train(0)).image, next(reader_of().train(0)).image)


def test_a_batch_size_above_the_training_split_is_refused() -> None:
    assert reader_of(batch_size=60).batches_per_epoch == 1
    with pytest.raises(ValueError, match="batch_size 61 is more than the 60 training pictures"):
        reader_of(batch_size=61)


@pytest.mark.parametrize("mean", [[0.4, 0.5, 0.6], [0.4, 0.5]])
def test_a_mean_for_other_channels_is_refused(mean: list[float]) -> None:
    # torch would broadcast three means over a grey picture, and make it a colour picture
    grey = Pictures(PICTURES.image[:, :1], PICTURES.label, 5)
    with pytest.raises(ValueError, match="mean"):
        next(Reader(run_of(data={"mean": mean, "std": [0.2] * len(mean)}), grey).train(0))


def test_a_worker_without_validation_pictures_is_refused() -> None:
    assert len(list(reader_of(14, 15, batch_size=15).validation())) == 1
    with pytest.raises(ValueError, match="15 validation pictures are fewer than 20 workers"):
        reader_of(0, 20, batch_size=20)


# --- an epoch that was broken off, and rows that lie in files ----------------------------------


def same(one: Batch, other: Batch) -> None:
    for name in ("image", "label", "index"):
        exactly(getattr(one, name), getattr(other, name))
    assert one.epoch == other.epoch
    assert one.teachers.keys() == other.teachers.keys()
    for label, said in one.teachers.items():
        exactly(said.logits, other.teachers[label].logits)
        assert said.features.keys() == other.teachers[label].features.keys()
        for layer, feature in said.features.items():
            exactly(feature, other.teachers[label].features[layer])


@pytest.mark.parametrize(("rank", "workers"), [(0, 1), (1, 2)])
def test_an_epoch_goes_on_from_any_batch(rank: int, workers: int) -> None:
    reader = reader_of(rank, workers)
    whole_epoch = list(reader.train(2))
    for start in range(reader.batches_per_epoch + 1):
        rest = list(reader.train(2, start=start))
        assert len(rest) == len(whole_epoch) - start
        for one, other in zip(rest, whole_epoch[start:], strict=True):
            same(one, other)


def in_files(folder: Path, held: np.ndarray) -> FileRows:
    writer = RowsWriter(folder, len(held), held.shape[1:], held.dtype)
    for start in range(0, len(held), 20):
        rows = np.arange(start, min(start + 20, len(held)))
        writer.put(rows, held[rows])
    return writer.close()


@pytest.mark.parametrize(("rank", "workers"), [(0, 1), (1, 4)])
def test_rows_in_files_make_the_same_batches_in_the_same_order(
    tmp_path: Path, rank: int, workers: int
) -> None:
    views = range(VIEWS + 1)
    streamed = TeacherRows(
        [in_files(tmp_path / f"logits{view}.npy", TEACHER.logits[view]) for view in views],
        {
            "embedding": [
                in_files(tmp_path / f"embedding{view}.npy", TEACHER.features["embedding"][view])
                for view in views
            ]
        },
    )
    pictures = Pictures(in_files(tmp_path / "image.npy", PICTURES.image), PICTURES.label, 5)
    here = Reader(run_of(), PICTURES, CACHED, rank, workers)
    there = Reader(run_of(), pictures, {"teacher": streamed}, rank, workers)
    for epoch in range(4):
        for one, other in zip(here.train(epoch), there.train(epoch), strict=True):
            same(one, other)
    for one, other in zip(here.validation(), there.validation(), strict=True):
        same(one, other)


def test_rows_that_a_file_leaves_out_are_not_numbers(tmp_path: Path) -> None:
    writer = RowsWriter(tmp_path / "rows.npy", 6, (2,), np.dtype(np.float16))
    writer.put(np.array([1, 3]), np.ones((2, 2), np.float16))
    rows = writer.close()
    expected = np.full((6, 2), np.nan, np.float16)
    expected[[1, 3]] = 1
    np.testing.assert_array_equal(rows[np.arange(6)], expected)
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), expected)  # plain numpy, too
    with pytest.raises(IndexError, match="has 6 rows, asked for row 6"):
        rows[np.array([0, 6])]


def test_batches_made_together_are_those_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    together = list(reader_of().train(0))
    monkeypatch.setattr("pipelines.data.BYTES_AT_ONCE", 1)
    for one, other in zip(together, reader_of().train(0), strict=True):
        same(one, other)
