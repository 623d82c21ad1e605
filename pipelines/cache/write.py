"""A cache is filled: actors of Ray Data write files, the driver marks what is whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
import torch

from kdcore.taps import Tapped
from pipelines.cache.columns import Column
from pipelines.cache.forward import PartWriter
from pipelines.cache.manifest import contents, marker, write_manifest
from pipelines.cache.parts import ROWS_PER_FILE, Group, Part, Receipt, parts_of
from pipelines.cache.storage import Store
from pipelines.cluster import worker_resources, workers_at_once
from pipelines.config import RunConfig
from pipelines.sources import Pictures

Watch = Callable[[int, int, str], None]  # rows done, rows in all, a note
Work = Sequence[tuple[Part, Sequence[Column]]]  # the columns that lack a part


def write_cache(
    run: RunConfig,
    pictures: Pictures,
    teacher: Tapped,
    store: Store,
    columns: Sequence[Column],
    watch: Watch,
    *,
    rows_per_file: int = ROWS_PER_FILE,
) -> None:
    """Write what is missing of a cache; files that stand are not written again.

    A file is one column of some rows of a view, in its place when it is whole; the marker of a
    column's view comes when all of its files are there with all of their rows. Of the processes of
    a machine that write one cache one writes, and the others wait for it.

    Raises OSError where nothing can be written, RuntimeError for what an actor cannot do.
    """
    views = parts_of(run, len(pictures.label), rows_per_file=rows_per_file)
    total = sum(len(part.rows) for parts in views for part in parts)
    with store.alone(lambda: watch(0, total, "written by another process")):
        write_manifest(store, contents(run, pictures, teacher), num_rows=len(pictures.label))
        groups = _unmarked(store, columns, views)
        work = _work(views, groups)
        done = total - sum(len(part.rows) for part, _ in work)
        watch(done, total, "")
        for part, receipts in written(work, run, pictures, teacher, store):
            _enter(part, receipts, groups)
            done += len(part.rows)
            watch(done, total, "")


def _unmarked(
    store: Store, columns: Sequence[Column], views: Sequence[Sequence[Part]]
) -> list[Group]:
    """The views of columns without their marker, after those that lacked nothing else have it."""
    groups = [
        Group(store, column, parts)
        for column in columns
        for view, parts in enumerate(views)
        if marker(store, column.folder, view) is None
    ]
    for group in groups:
        group.mark_if_whole()
    return groups


def _work(views: Sequence[Sequence[Part]], groups: Sequence[Group]) -> Work:
    lacking = [
        (part, [group.column for group in groups if group.lacks(part)])
        for parts in views
        for part in parts
    ]
    return [(part, columns) for part, columns in lacking if columns]


def _enter(part: Part, receipts: Mapping[str, Receipt], groups: Sequence[Group]) -> None:
    """The files of a part have come, by the folders of their columns."""
    for group in groups:
        if group.view == part.view and group.column.folder in receipts:
            group.enter(part, receipts[group.column.folder])
            group.mark_if_whole()


class _Actor:
    """A ``PartWriter`` in an actor of Ray Data: takes numbers of the list of work."""

    def __init__(
        self,
        run: RunConfig,
        pictures: ray.ObjectRef,
        teacher: ray.ObjectRef,
        store: Store,
        work: ray.ObjectRef,
    ) -> None:
        torch.set_num_threads(1)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.work: Work = ray.get(work)
        self.writer = PartWriter(run, ray.get(pictures), ray.get(teacher), store, device=device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part, columns = self.work[row["id"]]
        return {"id": row["id"], "receipts": json.dumps(self.writer.write(part, columns))}


def written(
    work: Work, run: RunConfig, pictures: Pictures, teacher: Tapped, store: Store
) -> Iterator[tuple[Part, dict[str, Receipt]]]:
    """Write parts in a pool of actors, yielding each with its files' receipts."""
    if not work:
        return
    ray.data.DataContext.get_current().raise_original_map_exception = True
    # the pool leaves SPARE_CPUS free: one that takes every CPU waits for its own input for ever
    size = min(len(work), workers_at_once())
    resources = worker_resources()
    items = [{"id": number} for number in range(len(work))]
    held = [ray.put(held) for held in (pictures, teacher.cpu(), work)]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _Actor,
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        fn_constructor_args=(run, held[0], held[1], store, held[2]),
    )
    try:
        for row in rows.iter_rows():
            yield work[row["id"]][0], json.loads(row["receipts"])
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(f"the cache could not be written: {error.cause}") from error
