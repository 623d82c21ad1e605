"""Pictures through the teacher, into Parquet files."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch

from kdcore.taps import Tapped
from kdcore.teachers import teacher_outputs
from kdcore.types import Outputs
from pipelines.build import teacher_precision
from pipelines.cache.columns import CRC, LABEL, LAYERS, SAMPLE, Column, LayerColumn, to_parquet
from pipelines.cache.manifest import view_folder
from pipelines.cache.parts import Part, Receipt, receipt_of, receipt_of_file
from pipelines.cache.storage import Store
from pipelines.config import RunConfig
from pipelines.data import view_of
from pipelines.parquet import read_parquet
from pipelines.sources import Pictures
from pipelines.views import normalised

ROWS_PER_FORWARD = 128


class PartWriter:
    """Writes the files of a part: its view through the teacher, once for all columns."""

    def __init__(
        self,
        run: RunConfig,
        pictures: Pictures,
        teacher: Tapped,
        store: Store,
        *,
        device: torch.device,
    ) -> None:
        self.run, self.pictures, self.store = run, pictures, store
        self.device = device
        self.teacher = teacher.to(device)

    def write(self, part: Part, columns: Sequence[Column]) -> dict[str, Receipt]:
        """Put a file into each column's folder; returns their receipts by folder.

        One that stands is left: who wrote it was killed before it could tell.
        """
        folders = {column: self._folder(column, part) for column in columns}
        lacking = [column for column in columns if not folders[column].has(part.file)]
        told = {
            column.folder: receipt_of_file(folders[column], part)
            for column in columns
            if column not in lacking
        }
        return told | (self._written(part, lacking) if lacking else {})

    def _folder(self, column: Column, part: Part) -> Store:
        return self.store / column.folder / view_folder(part.view)

    def _written(self, part: Part, columns: Sequence[Column]) -> dict[str, Receipt]:
        chunks = list(self._chunks(part, columns))
        crc = np.concatenate([crc for crc, _ in chunks])
        self._check_replay(part, crc)
        receipts = {}
        for place, column in enumerate(columns):
            held = pa.concat_tables(encoded[place] for _, encoded in chunks)
            content = to_parquet(self._named(part, column, crc, held.combine_chunks()))
            self._folder(column, part).write(part.file, content)
            receipts[column.folder] = receipt_of(content, num_rows=len(part.rows))
        return receipts

    def said(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, Outputs]:
        """The checksum of each picture of a view, and what the teacher says of it."""
        image = view_of(self.run, self.pictures, rows, view)
        crc = np.array([zlib.crc32(one.numpy()) for one in image], np.uint32)
        data = self.run.data
        pixels = normalised(image.to(self.device), mean=data.mean, std=data.std)
        outputs = teacher_outputs(
            self.teacher,
            pixels.contiguous(memory_format=torch.channels_last),
            precision=teacher_precision(self.run.teacher),
        )
        return crc, outputs

    def _named(self, part: Part, column: Column, crc: np.ndarray, held: pa.Table) -> pa.Table:
        """The rows with their numbers, beside logits with their labels and checksums too."""
        named = {SAMPLE: pa.array(part.rows, pa.int64())}
        if not isinstance(column, LayerColumn):
            label = self.pictures.label[part.rows]
            named |= {LABEL: pa.array(label, pa.int64()), CRC: pa.array(crc, pa.uint32())}
        return pa.table(named | {name: held[name] for name in held.column_names})

    def _chunks(
        self, part: Part, columns: Sequence[Column]
    ) -> Iterator[tuple[np.ndarray, list[pa.Table]]]:
        """Checksums of pictures, and each column's Parquet of them, a forward pass at a time."""
        for start in range(0, len(part.rows), ROWS_PER_FORWARD):
            rows = part.rows[start : start + ROWS_PER_FORWARD]
            crc, outputs = self.said(part.view, rows)
            label = self.pictures.label[rows]
            yield crc, [pa.table(column.encoded(outputs, label)) for column in columns]

    def _check_replay(self, part: Part, crc: np.ndarray) -> None:
        """What is added is of the pictures that the cache has already seen."""
        for name in self.store.listed(folders=True):
            folder = self.store / name / view_folder(part.view)
            if name != LAYERS and folder.has(part.file):
                place = f"cache file {folder / part.file}"
                table = read_parquet(folder.read(part.file), name=place, columns=[CRC])
                if not np.array_equal(table[CRC].to_numpy(), crc):
                    raise ValueError(
                        f"view {part.view} is not as it was when {folder / part.file} was "
                        "written: another version of a library draws other pixels; write a new "
                        "cache elsewhere (`--set caches=FOLDER`), manifest.json says with what "
                        "this one was made"
                    )
                return
