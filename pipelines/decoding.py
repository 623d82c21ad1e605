"""Encoded pictures to one array of pixels, in memory or in a file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from pipelines.datasets import DataConfig
from pipelines.memory import check_fits
from pipelines.rows import FileRows, RowsWriter


@dataclass(frozen=True)
class Encoded:
    """One part of a dataset as it is stored: where each picture is, how to get it, its label."""

    places: Sequence[str]
    contents: Sequence[Callable[[], bytes | None]]
    label: np.ndarray
    num_classes: int

    def only(self, classes: np.ndarray) -> Encoded:
        """The pictures of some classes, which get the numbers of their places in the list."""
        rows = np.flatnonzero(np.isin(self.label, classes))
        places, contents = ([held[row] for row in rows] for held in (self.places, self.contents))
        label = np.searchsorted(classes, self.label[rows])
        return Encoded(places, contents, label, len(classes))


def num_labels(label: np.ndarray) -> int:
    """How many classes there are if the last of them has a picture."""
    return int(label.max()) + 1


def stacked(
    encoded: Encoded, data: DataConfig, file: Path | None
) -> tuple[np.ndarray | FileRows, np.ndarray, tuple[str, ...]]:
    """Pixels, labels and what was skipped because it does not decode.

    In ``file``, if one is given, a picture at a time: then memory does not grow with their number.

    Raises ValueError where they would not fit into memory, and where none decodes.
    """
    if encoded.label.min() < 0:
        raise ValueError(f"labels must be 0, 1, 2, ...; found {encoded.label.min()}")
    kept: list[int] = []
    skipped: list[str] = []

    def decoded() -> Iterator[tuple[str, np.ndarray]]:
        for row, (place, content) in enumerate(zip(encoded.places, encoded.contents, strict=True)):
            try:
                picture = decode(place, content())
            except ValueError as error:
                if data.on_bad_image == "fail":
                    raise
                skipped.append(str(error))
                continue
            kept.append(row)
            yield place, picture

    pictures = same_shape(decoded(), data)
    first = next(pictures, None)
    if first is None:
        raise ValueError(f"no picture can be decoded; the first: {skipped[0]}")
    most, all_of_them = len(encoded.label), chain([first], pictures)
    if file is None:
        check_fits(first.nbytes * most, f"{most} pictures {first.shape}")
        image: np.ndarray | FileRows = _gathered(all_of_them, (most, *first.shape))
    else:
        image = _filed(all_of_them, RowsWriter(file, most, first.shape, first.dtype))
    return image, encoded.label[kept].astype(np.int64), tuple(skipped)


def _gathered(pictures: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    # not np.stack, which would hold all of them twice
    held, count = np.empty(shape, np.uint8), 0
    for picture in pictures:
        held[count] = picture
        count += 1
    return held[:count]


def _filed(pictures: Iterable[np.ndarray], writer: RowsWriter) -> FileRows:
    for row, picture in enumerate(pictures):
        writer.put(np.array([row]), picture[None])
    return writer.close()


def decode(place: str, content: bytes | None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content or b"")) as picture:
            grey = picture.mode in ("1", "L", "I;16")
            return np.asarray(picture.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{place}: a picture that cannot be decoded ({error})") from None


def same_shape(decoded: Iterable[tuple[str, np.ndarray]], data: DataConfig) -> Iterator[np.ndarray]:
    shape = None
    for place, picture in decoded:
        pixels = pixels_of(picture, data)
        shape = shape or pixels.shape
        if pixels.shape != shape:
            channels = pixels.shape[0] != shape[0]
            advice = "convert all to grey or all to colour" if channels else "give data.size"
            raise ValueError(
                f"{place} is (C, H, W) = {pixels.shape}, the first picture is {shape}; {advice}"
            )
        yield pixels


def pixels_of(picture: np.ndarray, data: DataConfig) -> np.ndarray:
    """(H, W) or (H, W, C) to (C, H, W), resized if the run says so."""
    from PIL import Image

    if data.size is not None and picture.shape[:2] != (data.size, data.size):
        resized = Image.fromarray(picture).resize((data.size, data.size), Image.Resampling.BILINEAR)
        picture = np.asarray(resized)
    return np.ascontiguousarray(np.atleast_3d(picture).transpose(2, 0, 1))
