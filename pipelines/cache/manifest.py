"""What a cache is of, where it is, and what of it is there."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from typing import Any

from kdcore.taps import Tapped
from pipelines.cache.columns import Column
from pipelines.cache.storage import Store, store_at
from pipelines.config import RunConfig
from pipelines.digests import digest, plain
from pipelines.models import weights_digest
from pipelines.sources import Pictures
from pipelines.views import VERSION as VIEWS_VERSION

SCHEMA_VERSION = 2
MANIFEST, DONE = "manifest.json", "_SUCCESS"
_MADE_WITH = ("torch", "torchvision", "pillow", "pyarrow", "ray")


def contents(run: RunConfig, pictures: Pictures, teacher: Tapped) -> dict[str, Any]:
    """Everything that decides a cached number: its digest is the cache's fingerprint.

    Views, layers and the format of the logits are not among it: a cache grows by them, and serves
    runs that want fewer.
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
    }


def fingerprint(content: Mapping[str, Any]) -> str:
    return digest(content)[:16]


def cache_store(caches: str, content: Mapping[str, Any]) -> Store:
    """Where the cache of this content is or will be, below ``caches``.

    ``caches`` may itself be one cache; ValueError then names what differs, if anything does.
    """
    place = store_at(caches)
    if not place.has(MANIFEST):
        return place / fingerprint(content)
    held = read_manifest(place)["content"]
    differing = [
        f"{key} is {held.get(key)!r}, expected {content[key]!r}"
        for key in content
        if held.get(key) != content[key]
    ]
    if differing:
        raise ValueError(
            f"cache {place} is not of this run: {'; '.join(differing)}; run "
            f"`kd cache RUN.yaml --set caches={place.parent}` to write the one that is, and train "
            "with the same --set"
        )
    return place


def read_manifest(store: Store) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(store.read(MANIFEST).to_pybytes())
    return held


def write_manifest(store: Store, content: Mapping[str, Any], *, num_rows: int) -> None:
    """What the cache is of, and which libraries made it; a cache that has one keeps it."""
    if store.has(MANIFEST):
        return
    libraries = {name: importlib.metadata.version(name) for name in _MADE_WITH}
    held = {"content": content, "rows": num_rows, "made_with": libraries}
    store.write(MANIFEST, _json(held))


def view_folder(view: int) -> str:
    return f"view={view:04d}"


def marker(store: Store, column: str, view: int) -> dict[str, Any] | None:
    """The files of one view of a column, with their rows and checksums, if all of it is there."""
    name = f"{column}/{view_folder(view)}/{DONE}"
    if not store.has(name):
        return None
    held: dict[str, Any] = json.loads(store.read(name).to_pybytes())
    return held


def mark(store: Store, column: str, view: int, files: Mapping[str, Any]) -> None:
    """The final marker of one view of a column."""
    store.write(f"{column}/{view_folder(view)}/{DONE}", _json(files))


def is_complete(store: Store, columns: Iterable[Column], views: int) -> bool:
    """Whether view 0 and ``views`` augmented ones of every column have their final markers."""
    return all(
        store.has(f"{column.folder}/{view_folder(view)}/{DONE}")
        for column in columns
        for view in range(views + 1)
    )


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
