"""Which files a cache has, and which of them are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cache.columns import Column
from pipelines.cache.manifest import mark, view_folder
from pipelines.cache.storage import Store
from pipelines.config import RunConfig
from pipelines.sources import split

ROWS_PER_FILE = 2048
PART = "part"

Receipt = Mapping[str, Any]  # of a file: its rows, its bytes and its checksum


@dataclass(frozen=True)
class Part:
    """Some rows of one view: a file in every column."""

    view: int
    number: int
    rows: np.ndarray

    @property
    def file(self) -> str:
        return f"{PART}-{self.number:05d}.parquet"


def parts_of(run: RunConfig, count: int, *, rows_per_file: int) -> list[list[Part]]:
    """The files of every view: all rows unaugmented, the training split in the other views."""
    train, _ = split(count, run.data)
    views = []
    for view in range(run.data.views + 1):
        rows = train if view else np.arange(count)
        pieces = [
            rows[start : start + rows_per_file] for start in range(0, len(rows), rows_per_file)
        ]
        views.append([Part(view, number, piece) for number, piece in enumerate(pieces)])
    return views


@dataclass
class Group:
    """One view of one column, until it has its marker: which of its files are there."""

    store: Store  # the cache's
    column: Column
    parts: Sequence[Part]
    receipts: dict[str, Receipt] = field(default_factory=dict)
    standing: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.standing = set(self.folder.listed())

    @property
    def view(self) -> int:
        return self.parts[0].view

    @property
    def folder(self) -> Store:
        return self.store / self.column.folder / view_folder(self.view)

    def lacks(self, part: Part) -> bool:
        return part.view == self.view and part.file not in self.standing

    def enter(self, part: Part, receipt: Receipt) -> None:
        """A file has come, as its receipt says."""
        self.receipts[part.file] = receipt
        self.standing.add(part.file)

    def mark_if_whole(self) -> None:
        """Write the final marker once every file is there with all of its rows."""
        if not self.standing >= {part.file for part in self.parts}:
            return
        for part in self.parts:  # those that an earlier call wrote before it was stopped
            if part.file not in self.receipts:
                self.receipts[part.file] = receipt_of_file(self.folder, part)
        files = {part.file: self.receipts[part.file] for part in self.parts}
        mark(self.store, self.column.folder, self.view, files)
        for name in self.folder.listed():  # that someone was killed while writing
            if name.startswith(f".{PART}"):
                self.folder.remove(name)


def receipt_of(content: pa.Buffer, *, num_rows: int) -> Receipt:
    """What a marker says of a file, to recognise it by."""
    return {"rows": num_rows, "bytes": content.size, "sha256": sha256(content).hexdigest()}


def receipt_of_file(folder: Store, part: Part) -> Receipt:
    """The receipt of a file that stands; ValueError where it is not whole."""
    content = folder.read(part.file)
    try:
        num_rows = pq.read_metadata(pa.BufferReader(content)).num_rows
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{folder / part.file} is no whole Parquet file ({error}); remove it and run "
            "`kd cache` again"
        ) from None
    if num_rows != len(part.rows):
        raise ValueError(
            f"{folder / part.file} holds {num_rows} rows instead of {len(part.rows)}; remove it "
            "and run `kd cache` again"
        )
    return receipt_of(content, num_rows=num_rows)
