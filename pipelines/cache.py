"""The teacher's outputs, computed once by Ray Data and kept as Parquet."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from kdcore.taps import EMBEDDING, Tapped
from kdcore.teachers import teacher_outputs
from kdcore.types import Outputs
from pipelines.build import teacher_precision
from pipelines.cluster import worker_resources, workers_at_once
from pipelines.config import RunConfig, digest, plain
from pipelines.data import TeacherRows, view_of
from pipelines.models import weights_digest
from pipelines.sources import Pictures, split
from pipelines.views import VERSION as VIEWS_VERSION
from pipelines.views import normalised

SCHEMA_VERSION = 1
MANIFEST, DONE = "manifest.json", "_SUCCESS"
ROWS_PER_FILE = 2048
ROWS_PER_FORWARD = 128

Watch = Callable[[int, int], None]  # rows done, rows in all


def contents(run: RunConfig, pictures: Pictures, teacher: Tapped) -> dict[str, Any]:
    """Everything that decides a cached number: its digest is the cache's fingerprint.

    The number of views is not among it, so that a cache grows by views and serves runs of fewer.
    """
    if run.teacher is None:
        raise ValueError(f"run {run.name!r} has no teacher, so there is nothing to cache")
    data, network = plain(run.data), plain(run.teacher.network)
    del network["weights"]  # the file's name; what is in it is digested
    return {
        "schema": SCHEMA_VERSION,
        "pictures": pictures.digest,
        "split": {key: data[key] for key in ("validation", "split_seed")},
        "views": {"version": VIEWS_VERSION, "seed": data["view_seed"], **data["augment"]},
        "normalisation": {key: data[key] for key in ("mean", "std")},
        "teacher": {**network, "digest": weights_digest(teacher.net)},
        "precision": run.teacher.precision,
        "layers": sorted({EMBEDDING, *teacher.layers}),
        "dtype": "float16",
    }


def fingerprint(content: dict[str, Any]) -> str:
    return digest(content)[:16]


def cache_folder(run: RunConfig, content: dict[str, Any]) -> Path:
    """The folder for this content: one that has it and perhaps more layers, else a new one.

    ``caches`` may itself be one cache; ValueError then names what differs, if anything does.
    """
    if (run.caches / MANIFEST).exists():
        line = f"kd cache RUN.yaml --set caches={run.caches.parent}"
        differing = _differing(_manifest(run.caches), content)
        if differing:
            raise ValueError(
                f"cache {run.caches} is not of this run: {'; '.join(differing)}; run `{line}` to "
                "write the one that is, and train with the same --set"
            )
        held = _manifest(run.caches)
        if held["layers"] != content["layers"] and not is_complete(run.caches, run.data.views):
            raise ValueError(
                f"cache {run.caches} lacks views and has the layers {held['layers']}, so this run "
                f"cannot add to it; run `{line}`, and train with the same --set"
            )
        return run.caches
    for manifest in sorted(run.caches.glob(f"*/{MANIFEST}")):
        fits = not _differing(_manifest(manifest.parent), content)
        if fits and is_complete(manifest.parent, run.data.views):
            return manifest.parent
    return run.caches / fingerprint(content)


def _manifest(folder: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return held


def _differing(held: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What keeps a cache from serving: more layers than are asked for do not."""
    return [
        f"{key} is {held.get(key)!r}, expected {wanted[key]!r}"
        for key in wanted
        if held.get(key) != wanted[key]
        and not (key == "layers" and set(wanted[key]) <= set(held.get(key, ())))
    ]


def fingerprint_of(folder: Path) -> str:
    """The fingerprint of the cache in a folder, which may hold more layers than were asked for."""
    return fingerprint(_manifest(folder))


def is_complete(folder: Path, views: int) -> bool:
    """Whether view 0 and ``views`` augmented ones are there with their final markers."""
    return all((_view_folder(folder, number) / DONE).exists() for number in range(views + 1))


def write_cache(
    run: RunConfig, pictures: Pictures, teacher: Tapped, folder: Path, watch: Watch
) -> None:
    """Write what is missing of a cache; files that stand are not written again.

    A file is one view of up to ROWS_PER_FILE rows, moved into place when it is whole; a view's
    marker comes when all of its files are there with all of their rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / MANIFEST, json.dumps(contents(run, pictures, teacher), indent=1))
    files = list(_files(run, len(pictures.label)))
    waiting = [file for file in files if not file.path(folder).exists()]
    total = sum(len(file.rows) for file in files)
    done = total - sum(len(file.rows) for file in waiting)
    watch(done, total)
    for count in _written(waiting, run, pictures, teacher, folder):
        done += count
        watch(done, total)
    for number in range(run.data.views + 1):
        _mark(folder, number, [file for file in files if file.view == number])


def read_cache(folder: Path, *, views: int, layers: tuple[str, ...], count: int) -> TeacherRows:
    """Views 0 to ``views`` of a complete cache, addressed by row number.

    Rows that a view does not hold (the validation split, in an augmented view) are NaN.
    """
    tables = [_read_view(_view_folder(folder, view)) for view in range(views + 1)]

    def column(name: str) -> np.ndarray:
        return np.stack([_by_row(table, name, count) for table in tables])

    held = {name: column(name) for name in ("logits", *layers)}
    return TeacherRows(held.pop("logits"), held)


def _read_view(folder: Path) -> pa.Table:
    """Every file that the view's marker lists, with all of its rows."""
    tables = []
    for name, listed in json.loads((folder / DONE).read_text()).items():
        if not (folder / name).exists():
            raise ValueError(f"cache file {folder / name} is gone; remove {folder} and cache again")
        tables.append(pq.read_table(folder / name))
        if tables[-1].num_rows != listed["rows"]:
            raise ValueError(
                f"cache file {folder / name} has {tables[-1].num_rows} rows instead of "
                f"{listed['rows']}; remove {folder} and cache again"
            )
    return pa.concat_tables(tables)


@dataclass(frozen=True)
class _File:
    """One Parquet file: some rows of one view."""

    view: int
    part: int
    rows: np.ndarray

    def path(self, folder: Path) -> Path:
        return _view_folder(folder, self.view) / f"part-{self.part:05d}.parquet"


class _Writer:
    """A teacher in an actor of Ray Data: takes files to write, returns how many rows each got."""

    def __init__(
        self, run: RunConfig, pictures: ray.ObjectRef, teacher: ray.ObjectRef, folder: Path
    ) -> None:
        torch.set_num_threads(1)
        self.run, self.folder = run, folder
        self.pictures: Pictures = ray.get(pictures)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher: Tapped = ray.get(teacher).to(self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        files = [
            _File(*file) for file in zip(batch["view"], batch["part"], batch["rows"], strict=True)
        ]
        for file in files:
            target = file.path(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            arriving = target.with_name(f".{target.name}.{os.getpid()}")
            pq.write_table(self._table(file), arriving, compression="zstd", row_group_size=4096)
            arriving.replace(target)
        return {"count": np.array([len(file.rows) for file in files])}

    def _table(self, file: _File) -> pa.Table:
        parts = [
            self._chunk(file.view, file.rows[start : start + ROWS_PER_FORWARD])
            for start in range(0, len(file.rows), ROWS_PER_FORWARD)
        ]
        return pa.concat_tables(parts).combine_chunks()

    def _chunk(self, number: int, rows: np.ndarray) -> pa.Table:
        image = view_of(self.run, self.pictures, rows, int(number))
        outputs = self._outputs(image)
        columns = {"logits": outputs.logits, **outputs.features}
        return pa.table(
            {
                "sample_id": pa.array(rows, pa.int64()),
                "view_id": pa.array(np.full(len(rows), number), pa.int32()),
                "label": pa.array(self.pictures.label[rows], pa.int64()),
                "view_crc": pa.array([zlib.crc32(one.numpy()) for one in image], pa.uint32()),
                **{name: _half(name, values) for name, values in columns.items()},
            }
        )

    def _outputs(self, image: torch.Tensor) -> Outputs:
        data = self.run.data
        pixels = normalised(image.to(self.device), mean=data.mean, std=data.std)
        return teacher_outputs(
            self.teacher,
            pixels.contiguous(memory_format=torch.channels_last),
            precision=teacher_precision(self.run.teacher),
        )


def _files(run: RunConfig, count: int) -> Iterator[_File]:
    train, _ = split(count, run.data)
    for number in range(run.data.views + 1):
        rows = train if number else np.arange(count)
        for part, start in enumerate(range(0, len(rows), ROWS_PER_FILE)):
            yield _File(number, part, rows[start : start + ROWS_PER_FILE])


def _written(
    files: list[_File], run: RunConfig, pictures: Pictures, teacher: Tapped, folder: Path
) -> Iterator[int]:
    """Write the files in a pool of actors, yielding the rows of each as it is done."""
    if not files:
        return
    items = [{"view": file.view, "part": file.part, "rows": file.rows} for file in files]
    ray.data.DataContext.get_current().raise_original_map_exception = True
    # the pool leaves SPARE_CPUS free: one that takes every CPU waits for its own input for ever
    size = min(len(files), workers_at_once())
    resources = worker_resources()
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Writer,
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        fn_constructor_kwargs={
            "run": run,
            "pictures": ray.put(pictures),
            "teacher": ray.put(teacher.cpu()),
            "folder": folder.absolute(),
        },
    )
    try:
        for row in rows.iter_rows():
            yield int(row["count"])
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(f"the cache could not be written: {error.cause}") from error


def _mark(folder: Path, number: int, files: list[_File]) -> None:
    """The view's final marker, with the checksum of every file, once every row is there."""
    listed = {}
    for file in files:
        path = file.path(folder)
        count = pq.read_metadata(path).num_rows
        if count != len(file.rows):
            raise ValueError(
                f"{path} holds {count} rows instead of {len(file.rows)}; remove it and run "
                "`kd cache` again"
            )
        listed[path.name] = {"rows": count, "sha256": sha256(path.read_bytes()).hexdigest()}
    _write_whole(_view_folder(folder, number) / DONE, json.dumps(listed, indent=1))


def _view_folder(folder: Path, number: int) -> Path:
    return folder / f"view={number:04d}"


def _write_whole(path: Path, text: str) -> None:
    arriving = path.with_name(f".{path.name}.{os.getpid()}")
    arriving.write_text(text + "\n")
    arriving.replace(path)


def _half(name: str, values: torch.Tensor) -> pa.FixedShapeTensorArray:
    held = values.float().cpu().contiguous().numpy()
    if np.abs(held).max() > np.finfo(np.float16).max:
        raise ValueError(
            f"the teacher's {name!r} reaches {np.abs(held).max():.3g}, more than float16 holds "
            "(65504): leave this layer out"
        )
    return pa.FixedShapeTensorArray.from_numpy_ndarray(held.astype(np.float16))


def _by_row(table: pa.Table, name: str, count: int) -> np.ndarray:
    values = table[name].combine_chunks().to_numpy_ndarray()
    placed = np.full((count, *values.shape[1:]), np.nan, np.float16)
    placed[table["sample_id"].to_numpy()] = values
    return placed
