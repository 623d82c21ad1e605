"""Where pictures come from: every source ends as one array of pixels and one of labels."""

from __future__ import annotations

import hashlib
import inspect
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kdcore.checks import unknown_name
from pipelines.config import DataConfig
from pipelines.views import permutation

Part = Literal["train", "test"]


@dataclass(frozen=True)
class Pictures:
    """One part of a dataset, decoded: a row is a picture and never changes its number."""

    image: np.ndarray  # (N, C, H, W) uint8
    label: np.ndarray  # (N,) int64
    num_classes: int

    @cached_property
    def digest(self) -> str:
        """sha256 of pixels and labels: the identity of the data, wherever it came from."""
        content = hashlib.sha256(repr((self.image.shape, self.num_classes)).encode())
        content.update(np.ascontiguousarray(self.image))
        content.update(np.ascontiguousarray(self.label))
        return content.hexdigest()


def read_pictures(data: DataConfig, part: Part) -> Pictures:
    """The training or the test part of a dataset.

    Raises ValueError for an unknown dataset, for a root that does not hold it, for pictures of
    different sizes where no ``size`` is given, and, naming the place, for one that does not decode.
    """
    identity = data.model_dump(include={"name", "root", "download", "size"})
    pictures = _read_once(DataConfig(**identity), part)
    if data.limit is None or part == "test":
        return pictures
    return Pictures(
        pictures.image[: data.limit], pictures.label[: data.limit], pictures.num_classes
    )


@lru_cache(maxsize=2)  # a run, its teacher's run and the trials' checks read the same pictures
def _read_once(data: DataConfig, part: Part) -> Pictures:
    read = SOURCES.get(data.name)
    return read(data, part) if read else _torchvision(data, part)


def split(count: int, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Sorted row numbers of the training and validation split of a training part of ``count``."""
    return split_rows(count, data.validation, data.split_seed)


def split_rows(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``split`` from its three numbers: the share of the rows that validates, and the seed."""
    order = permutation(count, seed=seed, epoch=0, stream="split").numpy()
    held_out = max(1, round(count * share))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _digits(data: DataConfig, part: Part) -> Pictures:
    """1,797 scans of digits, 8x8 in 17 grey levels, as scikit-learn ships them; every fifth tests.

    The rows come in runs by writer, so that the test part is drawn, with a seed of its own.
    """
    from sklearn.datasets import load_digits  # 1 s to import, and one source of many

    table = load_digits()
    scale = 255 / table.images.max()
    image = [_pixels(np.round(scan * scale).astype(np.uint8), data) for scan in table.images]
    order = permutation(len(image), seed=0, epoch=0, stream="split").numpy()
    tests = len(image) // 5
    rows = np.sort(order[:tests] if part == "test" else order[tests:])
    return Pictures(np.stack(image)[rows], table.target[rows].astype(np.int64), 10)


def _parquet(data: DataConfig, part: Part) -> Pictures:
    """Files ``<part>*.parquet`` with columns ``image`` = struct{bytes, path} and ``label``."""
    import pyarrow.parquet as pq

    root = _root(data)
    files = sorted(root.glob(f"{part}*.parquet"))
    if not files:
        raise ValueError(f"no {part}*.parquet in {root}; data.root should be the folder of them")
    encoded: list[tuple[str, bytes]] = []
    labels: list[np.ndarray] = []
    for file in files:
        missing = {"image", "label"} - set(pq.read_schema(file).names)
        if missing:
            raise ValueError(f"{file} lacks the columns {sorted(missing)}")
        table = pq.read_table(file, columns=["image", "label"])
        if pq.read_schema(file).field("image").type.num_fields == 0:
            raise ValueError(f"{file}: column image should be struct{{bytes, path}}")
        content = table["image"].combine_chunks().field("bytes")
        encoded += [(f"{file} row {row}", cell.as_py()) for row, cell in enumerate(content)]
        labels.append(table["label"].to_numpy())
    decoded = ((place, _decode(place, content)) for place, content in encoded)
    return _stacked(decoded, np.concatenate(labels), data)


def _folder(data: DataConfig, part: Part) -> Pictures:
    """``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val``), classes sorted."""
    root = _root(data)
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
    decoded = ((str(path), _decode(str(path), path.read_bytes())) for path in files)
    return _stacked(decoded, np.array([classes.index(path.parent.name) for path in files]), data)


def _torchvision(data: DataConfig, part: Part) -> Pictures:
    from torchvision import datasets

    classes = {name.lower(): name for name in datasets.__all__}
    if data.name.lower() not in classes:
        raise ValueError(unknown_name("dataset", data.name, [*SOURCES, *datasets.__all__]))
    dataset = getattr(datasets, classes[data.name.lower()])
    choice = inspect.signature(dataset).parameters
    selects: dict[str, Any] = {"train": part == "train"} if "train" in choice else {"split": part}
    try:
        rows = dataset(str(_root(data)), download=data.download, **selects)
    except (RuntimeError, FileNotFoundError, TypeError) as error:
        raise ValueError(
            f"torchvision's {data.name} in {data.root}: {error}; `--set data.download=true` "
            "fetches it"
        ) from None
    items = [(f"{data.name} {part} row {row}", item) for row, item in enumerate(rows)]
    decoded = ((place, np.asarray(image)) for place, (image, _) in items)
    return _stacked(decoded, np.array([int(label) for _, (_, label) in items]), data)


SOURCES: Mapping[str, Callable[[DataConfig, Part], Pictures]] = {
    "digits": _digits,
    "parquet": _parquet,
    "folder": _folder,
}


def _root(data: DataConfig) -> Path:
    if data.root is None:
        raise ValueError(f"data.name {data.name!r} needs data.root, the folder that holds it")
    if not data.root.is_dir() and not data.download:
        raise ValueError(f"data.root {data.root} is not a folder")
    return data.root


def _decode(place: str, content: bytes | None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content or b"")) as picture:
            grey = picture.mode in ("1", "L", "I;16")
            return np.asarray(picture.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{place}: a picture that cannot be decoded ({error})") from None


def _stacked(
    decoded: Iterable[tuple[str, np.ndarray]], label: np.ndarray, data: DataConfig
) -> Pictures:
    image = np.stack(list(_same_shape(decoded, data)))
    if label.min() < 0:
        raise ValueError(f"labels must be 0, 1, 2, ...; found {label.min()}")
    return Pictures(image, label.astype(np.int64), int(label.max()) + 1)


def _same_shape(
    decoded: Iterable[tuple[str, np.ndarray]], data: DataConfig
) -> Iterator[np.ndarray]:
    shape = None
    for place, picture in decoded:
        pixels = _pixels(picture, data)
        shape = shape or pixels.shape
        if pixels.shape != shape:
            channels = pixels.shape[0] != shape[0]
            advice = "convert all to grey or all to colour" if channels else "give data.size"
            raise ValueError(
                f"{place} is (C, H, W) = {pixels.shape}, the first picture is {shape}; {advice}"
            )
        yield pixels


def _pixels(picture: np.ndarray, data: DataConfig) -> np.ndarray:
    """(H, W) or (H, W, C) to (C, H, W), resized if the run says so."""
    from PIL import Image

    if data.size is not None and picture.shape[:2] != (data.size, data.size):
        resized = Image.fromarray(picture).resize((data.size, data.size), Image.Resampling.BILINEAR)
        picture = np.asarray(resized)
    return np.ascontiguousarray(np.atleast_3d(picture).transpose(2, 0, 1))
