"""Where encoded pictures lie: Parquet, folders of classes, Hugging Face's datasets, WebDataset."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.datasets import DataConfig
from pipelines.decoding import Encoded, num_labels
from pipelines.transfer_sets import DONE, invented

Part = Literal["train", "test"]
LABELS = ("label", "labels", "fine_label")  # as Hugging Face's datasets call them
IMAGES = ("image", "img")
# by which a root of each kind has a test part
TEST_FILES: Mapping[str, tuple[str, ...]] = {
    "parquet": ("test*.parquet",),
    "huggingface": ("test/state.json", "validation/state.json"),
    "folder": ("test/", "val/"),
    "webdataset": ("test*.tar",),
}


def _parquet(data: DataConfig, part: Part) -> Encoded:
    """Files ``<part>*.parquet`` with columns ``image`` = struct{bytes, path} and ``label``."""
    from pipelines.parquet import read_parquet

    root = root_of(data)
    classes = _transfer_classes(root)
    files = sorted(root.glob(f"{part}*.parquet"))
    if not files:
        raise ValueError(f"no {part}*.parquet in {root}; data.root should be the folder of them")
    columns = ["image", "label"]
    tables = [(str(file), read_parquet(file, name=file, columns=columns)) for file in files]
    encoded = _of_tables(tables, "image", "label")
    return replace(encoded, num_classes=max(classes, encoded.num_classes))


def _transfer_classes(root: Path) -> int:
    """Of a transfer set those of its teacher, as its pictures may lack the last; 0 of other data.

    Raises ValueError for a set that is not finished.
    """
    made = invented(root)
    if made is None:
        return 0
    if not (root / DONE).is_file():
        raise ValueError(
            f"{root} is an unfinished transfer set: it has no {DONE}; run `kd synthesize` again"
        )
    return made.num_classes


def _huggingface(data: DataConfig, part: Part) -> Encoded:
    """What ``save_to_disk`` of Hugging Face's datasets leaves: ``<part>/data-*.arrow``."""
    import pyarrow as pa

    from pipelines.parquet import refuse_objects

    root = root_of(data)
    folders = [root / name for name in (part, *(["validation"] if part == "test" else []))]
    found = [folder for folder in folders if (folder / "state.json").is_file()]
    if not found:
        raise ValueError(f"{root} has no {part}/state.json; save a DatasetDict there")
    state = json.loads((found[0] / "state.json").read_text())
    if state.get("_indices_files"):
        raise ValueError(f"{found[0]} selects rows by an index; call flatten_indices() and save it")
    tables = []
    for file in (found[0] / named["filename"] for named in state["_data_files"]):
        with pa.memory_map(str(file)) as source:
            tables.append((str(file), pa.ipc.open_stream(source).read_all()))
        refuse_objects(tables[-1][1].schema, name=file)
    names = tables[0][1].column_names
    chosen = [next((name for name in known if name in names), None) for known in (IMAGES, LABELS)]
    if None in chosen:
        raise ValueError(f"{found[0]} has the columns {names}; expected one of {IMAGES}, {LABELS}")
    return _of_tables(tables, *map(str, chosen))


def _of_tables(tables: Sequence[tuple[str, Any]], image: str, label: str) -> Encoded:
    places: list[str] = []
    contents: list[Callable[[], bytes | None]] = []
    for file, table in tables:
        if table.schema.field(image).type.num_fields == 0:
            raise ValueError(f"{file}: column {image} should be struct{{bytes, path}}")
        cells = table[image].combine_chunks().field("bytes")
        places += [f"{file} row {row}" for row in range(len(cells))]
        contents += [cell.as_py for cell in cells]
    labels = [table[label].to_numpy() for _, table in tables]
    joined = np.concatenate(labels).astype(np.int64)
    return Encoded(places, contents, joined, num_labels(joined))


def _folder(data: DataConfig, part: Part) -> Encoded:
    """``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val``), classes sorted."""
    root = root_of(data)
    names = ["train"] if part == "train" else ["test", "val"]
    found = [root / name for name in names if (root / name).is_dir()]
    if not found:
        raise ValueError(f"{root} has no folder {' or '.join(names)} with one folder per class")
    classes = sorted(folder.name for folder in (root / "train").glob("*/"))
    files = sorted(path for path in found[0].glob("*/*") if path.is_file())
    strange = sorted({path.parent.name for path in files} - set(classes))
    if strange or not files:
        raise ValueError(
            f"{found[0]} holds no pictures of the classes that {root / 'train'} has: "
            f"{strange or 'it is empty'}"
        )
    label = np.array([classes.index(path.parent.name) for path in files])
    contents = [path.read_bytes for path in files]
    return Encoded([str(path) for path in files], contents, label, num_labels(label))


def _webdataset(data: DataConfig, part: Part) -> Encoded:
    """Tars ``<part>*.tar`` of samples ``KEY.<picture>`` and ``KEY.cls``, in their order."""
    root = root_of(data)
    files = sorted(root.glob(f"{part}*.tar"))
    if not files:
        raise ValueError(f"no {part}*.tar in {root}; data.root should be the folder of them")
    places: list[str] = []
    contents: list[Callable[[], bytes | None]] = []
    labels: list[int] = []
    for file in files:
        for key, members in _samples(file).items():
            pictures = [kind for kind in members if kind not in ("cls", "json", "txt")]
            if "cls" not in members or len(pictures) != 1:
                raise ValueError(
                    f"{file} sample {key!r} has {sorted(members)}; expected one picture and a .cls"
                )
            places.append(f"{file} {key}.{pictures[0]}")
            contents.append(partial(_member, file, *members[pictures[0]]))
            labels.append(int(_member(file, *members["cls"])))
    return Encoded(places, contents, np.array(labels), num_labels(np.array(labels)))


def _samples(file: Path) -> Mapping[str, dict[str, tuple[int, int]]]:
    """By key, where each of its files begins in the tar and how long it is."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            if member.isfile():
                folder, slash, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                place = (member.offset_data, member.size)
                found.setdefault(folder + slash + key, {})[kind.lower()] = place
    return found


def _member(file: Path, start: int, length: int) -> bytes:
    with file.open("rb") as tar:
        tar.seek(start)
        return tar.read(length)


ENCODED: Mapping[str, Callable[[DataConfig, Part], Encoded]] = {
    "parquet": _parquet,
    "folder": _folder,
    "huggingface": _huggingface,
    "webdataset": _webdataset,
}


def root_of(data: DataConfig) -> Path:
    if data.root is None:
        raise ValueError(f"data.name {data.name!r} needs data.root, the folder that holds it")
    if not data.root.is_dir() and not data.download:
        raise ValueError(f"data.root {data.root} is not a folder")
    return data.root
