"""A small cache, as the tests of caches make, grow and break it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from kdcore.taps import Tapped
from pipelines.build import build_teacher
from pipelines.cache.columns import Column, columns_of
from pipelines.cache.forward import PartWriter
from pipelines.cache.manifest import cache_store, contents
from pipelines.cache.parts import Part, Receipt
from pipelines.cache.read import read_cache
from pipelines.cache.storage import Store
from pipelines.cache.write import Work, write_cache
from pipelines.config import RunConfig
from pipelines.data import TeacherRows
from pipelines.loading import load
from pipelines.sources import Pictures, read_pictures, split
from pipelines.space import changed

ROWS_PER_FILE = 100
LAYERS = ("block1",)


def quiet(done: int, total: int, note: str) -> None:
    pass


def toy(**changes: object) -> RunConfig:
    """The toy run, with ``data__views=3`` for ``data.views``."""
    loaded = load(Path(__file__).parent / "toy.yaml")
    assert isinstance(loaded, RunConfig)
    return changed(loaded, {path.replace("__", "."): value for path, value in changes.items()})


def pictures_of(run: RunConfig) -> Pictures:
    return read_pictures(run.data, "train")


def teacher_of(run: RunConfig, layers: Sequence[str] = LAYERS) -> Tapped:
    assert run.teacher is not None
    torch.manual_seed(7)
    return build_teacher(run.teacher, pictures_of(run), layers)


def columns_for(run: RunConfig, layers: Sequence[str] = LAYERS) -> tuple[Column, ...]:
    assert run.teacher is not None
    return columns_of(run.teacher.logits, teacher_of(run, layers))


def store_of(run: RunConfig) -> Store:
    return cache_store(run.caches, contents(run, pictures_of(run), teacher_of(run)))


def write(
    run: RunConfig,
    layers: Sequence[str] = LAYERS,
    watch: Callable[[int, int, str], None] = quiet,
    rows_per_file: int = ROWS_PER_FILE,
) -> Store:
    store = store_of(run)
    write_cache(
        run,
        pictures_of(run),
        teacher_of(run, layers),
        store,
        columns_for(run, layers),
        watch,
        rows_per_file=rows_per_file,
    )
    return store


def read(run: RunConfig, layers: Sequence[str] = LAYERS) -> TeacherRows:
    return read_cache(
        store_of(run),
        columns_for(run, layers),
        pictures_of(run),
        views=run.data.views,
        spool=run.data.spool,
    )


def written_here(
    work: Work, run: RunConfig, pictures: Pictures, teacher: Tapped, store: Store
) -> Iterator[tuple[Part, dict[str, Receipt]]]:
    """As ``write.written``, without Ray, whose start takes longer than all of a small cache."""
    writer = PartWriter(run, pictures, teacher, store, device=torch.device("cpu"))
    for part, columns in work:
        yield part, writer.write(part, columns)


def rows_of_views(run: RunConfig) -> list[list[int]]:
    """The sample numbers that each view should hold."""
    count = len(pictures_of(run).label)
    train, _ = split(count, run.data)
    return [np.arange(count).tolist(), *[train.tolist()] * run.data.views]


def files_of(folder: Path) -> dict[str, int]:
    """Every Parquet file and when it was last written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.glob("**/part-*.parquet")
    }


ROWS_PER_CRASH_FILE = 40


def crash_run(folder: str) -> RunConfig:
    """The run whose cache is written while somebody is killed, in (10 + 2 * 8) * 3 files."""
    return toy(caches=folder, data__views=2)
