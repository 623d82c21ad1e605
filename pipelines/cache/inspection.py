"""What is in a cache, whether it is still what it was, and what of it was never finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pyarrow as pa

from pipelines.cache.columns import CRC, LABEL, LAYERS, SAMPLE, TRACE, Column, part_arrays
from pipelines.cache.forward import PartWriter
from pipelines.cache.manifest import MANIFEST, marker, view_folder
from pipelines.cache.storage import Store
from pipelines.parquet import read_parquet

# What is stored may differ from what the teacher says now by the rounding of float16 (0.008 at 16),
# and by the order of sums on another machine; eight-bit codes by one.
TOLERANCE, CODE_TOLERANCE = 1e-2, 1
PLACES, ROWS_PER_PLACE = 8, 8  # 64 rows of up to 8 files, each a forward pass


@dataclass(frozen=True)
class ColumnInfo:
    """The finished views of one column."""

    folder: str
    views: int
    rows: int
    num_bytes: int

    @property
    def bytes_per_row(self) -> float:
        return self.num_bytes / self.rows


@dataclass(frozen=True)
class CacheInfo:
    """What stands in a cache."""

    store: Store
    columns: Sequence[ColumnInfo]
    unfinished: Sequence[str]  # views of columns without their marker
    accuracy: float | None  # of the teacher on all unaugmented pictures, where its logits are there


def caches_in(place: Store) -> list[Store]:
    """The caches in a folder, or the one that it is."""
    if place.has(MANIFEST):
        return [place]
    below = (place / name for name in place.listed(folders=True))
    return [store for store in below if store.has(MANIFEST)]


def inspected(store: Store) -> CacheInfo:
    """Rows and bytes of each column, and the teacher's accuracy from what is stored."""
    held: dict[str, list[Mapping[str, dict[str, int]]]] = {}
    unfinished = []
    for column, view in _views(store):
        files = marker(store, column, view)
        if files is None:
            unfinished.append(f"{column}/{view_folder(view)}")
        else:
            held.setdefault(column, []).append(files)
    columns = []
    for column, views in held.items():
        files = [file for view in views for file in view.values()]
        rows, size = (sum(file[key] for file in files) for key in ("rows", "bytes"))
        columns.append(ColumnInfo(column, len(views), rows, size))
    return CacheInfo(store, columns, unfinished, _accuracy(store, held))


def damaged_files(store: Store) -> list[str]:
    """The files of finished views that are gone, or not those that their markers list."""
    wrong = []
    for column, view in _views(store):
        folder = store / column / view_folder(view)
        for name, listed in (marker(store, column, view) or {}).items():
            right = folder.has(name) and sha256(folder.read(name)).hexdigest() == listed["sha256"]
            if not right:
                wrong.append(str(folder / name))
    return wrong


def greatest_differences(
    store: Store, columns: Sequence[Column], writer: PartWriter, random: np.random.Generator
) -> dict[str, float]:
    """How far what is stored of random rows is from what the teacher says of them now.

    By column, as a share of what is tolerated: above 1 is wrong. Pictures whose checksum differs
    are infinitely far.
    """
    places = [
        (view, name)
        for view in range(sum(folder == columns[0].folder for folder, _ in _views(store)))
        for name in marker(store, columns[0].folder, view) or {}
    ]
    chosen = random.permutation(len(places))[:PLACES]
    worst = dict.fromkeys((column.folder for column in columns), 0.0)
    for view, name in (places[place] for place in chosen):
        files = {
            column: _table(store / column.folder / view_folder(view), name) for column in columns
        }
        rows = files[columns[0]][SAMPLE].to_numpy()
        some = np.sort(random.permutation(len(rows))[:ROWS_PER_PLACE])
        crc, said = writer.said(view, rows[some])
        label = writer.pictures.label[rows[some]]
        for column, table in files.items():
            now = part_arrays(pa.table(column.encoded(said, label)))
            off = _difference(now, part_arrays(table.take(some)))
            if CRC in table.column_names and table[CRC].take(some).to_pylist() != crc.tolist():
                off = np.inf
            worst[column.folder] = max(worst[column.folder], off)
    return worst


def prune(store: Store) -> list[str]:
    """Remove the views of columns that were never finished, and a cache that has no others.

    Raises ValueError where another process is writing them.
    """

    def refuse() -> None:
        raise ValueError(f"{store} is being written by another process; nothing was removed")

    with store.alone(refuse):
        found = inspected(store)
        if not found.columns:
            store.remove()
            return [str(store)]
        for name in found.unfinished:
            store.remove(name)
        return [str(store / name) for name in found.unfinished]


def _views(store: Store) -> Iterator[tuple[str, int]]:
    """Every column and view that has a folder."""
    top = [name for name in store.listed(folders=True) if name != LAYERS]
    layers = [f"{LAYERS}/{name}" for name in (store / LAYERS).listed(folders=True)]
    for column in (*top, *layers):
        for name in (store / column).listed(folders=True):
            yield column, int(name.removeprefix("view="))


def _accuracy(store: Store, finished: Mapping[str, object]) -> float | None:
    """Of the first format of logits that has view 0."""
    for column in finished:
        files = None if column.startswith((LAYERS, TRACE)) else marker(store, column, 0)
        if files is not None:
            right = total = 0
            for name in files:
                table = _table(store / column / view_folder(0), name)
                arrays, label = part_arrays(table), table[LABEL].to_numpy()
                logits = arrays["logits"]
                said = arrays["classes"][:, 0] if "classes" in arrays else logits.argmax(axis=1)
                right, total = right + int((said == label).sum()), total + len(label)
            return right / total
    return None


def _difference(now: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray]) -> float:
    """The greatest, in units of what is tolerated; classes are known by their logits."""
    return max(
        float(np.abs(now[name].astype(np.float64) - stored[name]).max())
        / (TOLERANCE if now[name].dtype.kind == "f" else CODE_TOLERANCE)
        for name in now
        if name != "classes"
    )


def _table(folder: Store, name: str) -> pa.Table:
    return read_parquet(folder.read(name), name=f"cache file {folder / name}")
