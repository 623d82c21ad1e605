"""A teacher's runs as Parquet, in a cache like any other: written once, for every student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kdcore.dgm.columns import SiteLayout, layout_of, to_columns
from kdcore.dgm.trace import Trace
from pipelines.cache.columns import SAMPLE, TRACE, as_tensors, part_arrays, to_parquet
from pipelines.cache.inspection import TOLERANCE, damaged_files
from pipelines.cache.manifest import (
    cache_store,
    fingerprint,
    mark,
    marker,
    view_folder,
    write_manifest,
)
from pipelines.cache.parts import Part, Receipt, receipt_of, receipt_of_file
from pipelines.cache.read import read_folder
from pipelines.cache.storage import Store
from pipelines.digests import plain
from pipelines.generative.config import GenerativeConfig, GenerativeTeacher
from pipelines.generative.models import Model
from pipelines.generative.traces import SEED, Traces, run_of_rows
from pipelines.models import weights_digest

SCHEMA_VERSION = 1
ROWS_PER_FILE = 1024
_CHECKED = 64  # rows of which the teacher speaks again
Watch = Callable[[int, int, str], None]  # rows done, rows in all, a note


class TraceCache:
    """Where the runs of one run's teacher are or will be."""

    def __init__(self, run: GenerativeConfig, teacher: Model) -> None:
        assert run.teacher is not None
        self._held: GenerativeTeacher = run.teacher
        self._teacher = teacher.eval()
        self._layout: list[SiteLayout] = layout_of(self._run(np.arange(2)))
        content = self._content()
        self.fingerprint = fingerprint(content)
        self.store: Store = cache_store(run.caches, content)

    def traces(self, watch: Watch) -> Traces:
        """The runs, written first where they are not all there.

        Raises OSError where nothing can be written.
        """
        if marker(self.store, TRACE, 0) is None:
            with self.store.alone(lambda: watch(0, self._held.rows, "written by another process")):
                self._write(watch)
        return Traces(read_folder(self.store, TRACE, count=self._held.rows), self._layout)

    def faults(self) -> list[str]:
        """What is wrong with the cache: its files, or what the teacher says again of some rows.

        Raises ValueError where it is not complete.
        """
        if marker(self.store, TRACE, 0) is None:
            raise ValueError(f"cache {self.store} is not complete; run `kd cache` first")
        damaged = damaged_files(self.store)
        if damaged:
            return [f"{name} is gone or has changed" for name in damaged]
        held = read_folder(self.store, TRACE, count=self._held.rows)
        rows = np.random.default_rng().permutation(self._held.rows)[:_CHECKED]
        return [
            f"{self.store / TRACE}: the teacher differs in {name!r}"
            for name, said in part_arrays(self._table(rows)).items()
            if not np.abs(said.astype(np.float64) - held[name][rows]).max() <= TOLERANCE
        ]

    def _content(self) -> dict[str, Any]:
        """Everything that decides a kept number."""
        return {
            "schema": SCHEMA_VERSION,
            "teacher": {
                **plain(self._held.network),
                "digest": weights_digest(self._teacher.generator),
            },
            "noise": {"rows": self._held.rows, "seed": SEED},
            "layout": [list(site) for site in self._layout],
        }

    def _write(self, watch: Watch) -> None:
        """Put every file in its place that is not there, and then the marker."""
        write_manifest(self.store, self._content(), num_rows=self._held.rows)
        receipts: dict[str, Receipt] = {}
        for number, first in enumerate(range(0, self._held.rows, ROWS_PER_FILE)):
            watch(first, self._held.rows, "")
            part = Part(0, number, np.arange(first, min(first + ROWS_PER_FILE, self._held.rows)))
            receipts[part.file] = self._receipt(part)
        mark(self.store, TRACE, 0, receipts)
        watch(self._held.rows, self._held.rows, "")

    def _receipt(self, part: Part) -> Receipt:
        folder = self.store / TRACE / view_folder(0)
        if folder.has(part.file):  # of a call that was stopped
            return receipt_of_file(folder, part)
        content = to_parquet(self._table(part.rows))
        folder.write(part.file, content)
        return receipt_of(content, num_rows=len(part.rows))

    def _table(self, rows: np.ndarray) -> pa.Table:
        columns = to_columns(self._run(rows))
        arrays = {name: as_tensors(held.cpu().numpy()) for name, held in columns.items()}
        return pa.table({SAMPLE: pa.array(rows, pa.int64()), **arrays})

    def _run(self, rows: np.ndarray) -> Trace:
        return run_of_rows(self._held.network, self._teacher, torch.from_numpy(rows))
