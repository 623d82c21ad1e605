"""A complete cache as rows: in memory, or in flat files where they do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock

from pipelines.cache.columns import SAMPLE, Column, LayerColumn, part_arrays
from pipelines.cache.manifest import DONE, marker, view_folder
from pipelines.cache.storage import Store
from pipelines.data import TeacherRows
from pipelines.memory import check_fits
from pipelines.parquet import read_parquet
from pipelines.rows import Rows, RowsWriter, blank, open_rows
from pipelines.sources import Pictures


def read_cache(
    store: Store, columns: Sequence[Column], pictures: Pictures, *, views: int, spool: Path | None
) -> TeacherRows:
    """Views 0 to ``views`` of a complete cache, addressed by row number.

    Rows that a view does not hold (the validation split, in an augmented view) are NaN. With
    ``spool`` they are unpacked into flat files there, once, and read from them row by row.

    Raises ValueError where a file that a marker lists is gone or has other rows, and, before any
    is read, where they would not fit into memory.
    """
    if spool is None:
        row = sum(_bytes_per_row(store, column.folder) for column in columns)
        check_fits(row * len(pictures.label) * (views + 1), f"cache {store}")
    held: dict[Column, tuple[Rows, ...]] = {}
    for column in columns:
        parts = [
            _parts(store, column, view, len(pictures.label), spool) for view in range(views + 1)
        ]
        held[column] = tuple(column.rows(named, pictures) for named in parts)
    layers = [column for column in columns if isinstance(column, LayerColumn)]
    (logits,) = set(columns) - set(layers)
    return TeacherRows(held[logits], {column.layer: held[column] for column in layers})


def read_folder(store: Store, column: str, *, count: int) -> dict[str, np.ndarray]:
    """All that stands in the files of one column that has no views, by row number.

    Raises ValueError like ``read_cache``.
    """
    check_fits(_bytes_per_row(store, column) * count, f"cache {store}")
    return _in_memory(_tables(store, column, 0), count)


def _bytes_per_row(store: Store, column: str) -> int:
    """Of a column as it is held, unpacked: of its first file."""
    first = part_arrays(next(_tables(store, column, 0)))
    return sum(values[:1].nbytes for values in first.values())


def _parts(
    store: Store, column: Column, view: int, count: int, spool: Path | None
) -> dict[str, Rows]:
    """What stands in the Parquet columns of a view, each as rows by number."""
    if spool is None:
        return {**_in_memory(_tables(store, column.folder, view), count)}
    folder = spool / store.name / column.folder / view_folder(view)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / DONE).exists():
            _unpack(_tables(store, column.folder, view), count, folder)
            (folder / DONE).touch()
    return {path.stem: open_rows(path) for path in sorted(folder.glob("*.npy"))}


def _tables(store: Store, column: str, view: int) -> Iterator[pa.Table]:
    """Every file that the view's marker lists, with all of its rows."""
    folder = store / column / view_folder(view)
    for name, listed in (marker(store, column, view) or {}).items():
        if not folder.has(name):
            raise ValueError(f"cache file {folder / name} is gone; remove {folder} and cache again")
        table = read_parquet(folder.read(name), name=f"cache file {folder / name}")
        if table.num_rows != listed["rows"]:
            raise ValueError(
                f"cache file {folder / name} has {table.num_rows} rows instead of "
                f"{listed['rows']}; remove {folder} and cache again"
            )
        yield table


def _in_memory(tables: Iterable[pa.Table], count: int) -> dict[str, np.ndarray]:
    held: dict[str, np.ndarray] = {}
    for table in tables:
        rows = table[SAMPLE].to_numpy()
        for name, values in part_arrays(table).items():
            if name not in held:
                held[name] = blank((count, *values.shape[1:]), values.dtype)
            held[name][rows] = values
    return held


def _unpack(tables: Iterable[pa.Table], count: int, folder: Path) -> None:
    writers: dict[str, RowsWriter] = {}
    for table in tables:
        rows = table[SAMPLE].to_numpy()
        for name, values in part_arrays(table).items():
            if name not in writers:
                path = folder / f"{name}.npy"
                writers[name] = RowsWriter(path, count, values.shape[1:], values.dtype)
            writers[name].put(rows, values)
    for writer in writers.values():
        writer.close()
