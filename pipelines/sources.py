"""Where pictures come from: every source ends as one array of pixels and one of labels."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from kdcore.checks import unknown_name
from pipelines.archives import ENCODED, TEST_FILES, Part, root_of
from pipelines.datasets import DataConfig
from pipelines.decoding import pixels_of, same_shape, stacked
from pipelines.digests import digest
from pipelines.rows import FileRows
from pipelines.views import permutation

ROWS_AT_ONCE = 1024  # read from a file where rows lie in one


@dataclass(frozen=True)
class Pictures:
    """One part of a dataset, decoded: a row is a picture and never changes its number."""

    image: np.ndarray | FileRows  # (N, C, H, W) uint8
    label: np.ndarray  # (N,) int64
    num_classes: int
    skipped: tuple[str, ...] = ()  # what does not decode, with its place

    @cached_property
    def digest(self) -> str:
        """sha256 of pixels and labels: the identity of the data, wherever it came from."""
        shape = (len(self.label), *self.image.shape[1:])
        content = hashlib.sha256(repr((shape, self.num_classes)).encode())
        for start in range(0, len(self.label), ROWS_AT_ONCE):
            end = min(start + ROWS_AT_ONCE, len(self.label))  # a file may have room for more
            content.update(np.ascontiguousarray(self.image[start:end]))
        content.update(np.ascontiguousarray(self.label))
        return content.hexdigest()


_DECIDES_PIXELS = {
    *("name", "root", "download", "size", "classes", "classes_seed", "on_bad_image", "spool")
}


def read_pictures(data: DataConfig, part: Part) -> Pictures:
    """The training or the test part of a dataset.

    The test part may be another dataset's (``data.test``), prepared as the training pictures are.

    Raises ValueError for an unknown dataset, for a root that does not hold it, for pictures of
    different sizes where no ``size`` is given, and, naming the place, for one that does not decode.
    """
    if part == "test" and data.test is not None:
        data = data.model_copy(update={"name": data.test.name, "root": data.test.root})
    identity = data.model_dump(include=_DECIDES_PIXELS)
    pictures = _read_once(DataConfig(**identity), part)
    if data.limit is None or part == "test":
        return pictures
    first = slice(data.limit)
    return replace(pictures, image=pictures.image[first], label=pictures.label[first])


def has_test_part(data: DataConfig) -> bool:
    """Whether a student can be tested: files of one's own may be for training alone."""
    if data.test is not None or data.name not in TEST_FILES:
        return True
    root = root_of(data)
    return any(True for pattern in TEST_FILES[data.name] for _ in root.glob(pattern))


# a run, its teacher's run and the trials' checks read the same pictures; a test part of others, too
@lru_cache(maxsize=3)
def _read_once(data: DataConfig, part: Part) -> Pictures:
    if data.name in ENCODED:
        return _decoded(data, part)
    pictures = SOURCES.get(data.name, _torchvision)(data, part)
    if data.classes is None:
        return pictures
    classes = _chosen(pictures.num_classes, data)
    rows = np.flatnonzero(np.isin(pictures.label, classes))
    label = np.searchsorted(classes, pictures.label[rows])
    return Pictures(pictures.image[rows], label, len(classes))


def _decoded(data: DataConfig, part: Part) -> Pictures:
    encoded = ENCODED[data.name](data, part)
    num_classes = encoded.num_classes
    if data.classes is not None:
        # of the training part: the test part may lack the last of them
        training = encoded if part == "train" else ENCODED[data.name](data, "train")
        classes = _chosen(training.num_classes, data)
        encoded, num_classes = encoded.only(classes), len(classes)
    file = None
    if data.spool is not None:
        chosen = data.model_dump(mode="json", exclude={"spool"})
        file = data.spool / f"pictures-{digest(chosen)[:16]}" / f"{part}.npy"
    image, label, skipped = stacked(encoded, data, file)
    return Pictures(image, label, num_classes, skipped)


def _chosen(num_classes: int, data: DataConfig) -> np.ndarray:
    """``data.classes`` of the classes, drawn with their seed, in ascending order."""
    if data.classes is None or data.classes > num_classes:
        raise ValueError(f"data.classes is {data.classes}, and there are {num_classes} classes")
    order = permutation(num_classes, seed=data.classes_seed, epoch=0, stream="classes").numpy()
    return np.sort(order[: data.classes])


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
    image = [pixels_of(np.round(scan * scale).astype(np.uint8), data) for scan in table.images]
    order = permutation(len(image), seed=0, epoch=0, stream="split").numpy()
    tests = len(image) // 5
    rows = np.sort(order[:tests] if part == "test" else order[tests:])
    return Pictures(np.stack(image)[rows], table.target[rows].astype(np.int64), 10)


def _torchvision(data: DataConfig, part: Part) -> Pictures:
    from torchvision import datasets

    classes = {name.lower(): name for name in datasets.__all__}
    if data.name.lower() not in classes:
        raise ValueError(unknown_name("dataset", data.name, [*SOURCES, *datasets.__all__]))
    dataset = getattr(datasets, classes[data.name.lower()])
    choice = inspect.signature(dataset).parameters
    selects: dict[str, Any] = {"train": part == "train"} if "train" in choice else {"split": part}
    try:
        rows = dataset(str(root_of(data)), download=data.download, **selects)
    except TypeError as error:  # it takes other arguments, as ImageFolder and ImageNet do
        raise ValueError(
            f"torchvision's {data.name} has no train and test parts by `download` ({error}); "
            "pictures in a folder of each class are `data.name: folder`"
        ) from None
    except (RuntimeError, FileNotFoundError) as error:
        raise ValueError(
            f"torchvision's {data.name} in {data.root}: {error}; `--set data.download=true` "
            "fetches it"
        ) from None
    items = [(f"{data.name} {part} row {row}", item) for row, item in enumerate(rows)]
    shapes = same_shape(((place, np.asarray(image)) for place, (image, _) in items), data)
    image, label = np.stack(list(shapes)), np.array([int(label) for _, (_, label) in items])
    return Pictures(image, label.astype(np.int64), int(label.max()) + 1)


SOURCES: Mapping[str, Callable[[DataConfig, Part], Pictures]] = {"digits": _digits}
