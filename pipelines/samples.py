"""Pictures that were made, as PNG: one by one, and some of them together to be looked at."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

_EPOCHS = "synthetic/epoch-{}.png"  # in a run's folder
SIDE = 8  # pictures in a row and in a column, at most


def grid(image: np.ndarray) -> np.ndarray:
    """The first pictures (N, C, H, W) in rows beside and below each other: (C, rows, columns)."""
    side = min(SIDE, int(len(image) ** 0.5))
    shown = image[: side * side].reshape(side, side, *image.shape[1:])
    rows = [np.concatenate(list(row), axis=2) for row in shown]
    return np.concatenate(rows, axis=1)


def png(picture: np.ndarray) -> bytes:
    """A picture (C, H, W) of 8 bits and one or three channels."""
    written = io.BytesIO()
    channels_last = picture.transpose(1, 2, 0)
    Image.fromarray(channels_last[:, :, 0] if len(picture) == 1 else channels_last).save(
        written, "PNG"
    )
    return written.getvalue()


def epoch_grid(run: Path, epoch: int) -> Path:
    """Where some pictures of an epoch are drawn, if they are, in the folder of a run."""
    return run / _EPOCHS.format(f"{epoch:05d}")


def last_grids(run: Path) -> list[Path]:
    """The picture of the last epoch of which there is one; none where there is none."""
    return sorted(run.glob(_EPOCHS.format("*")))[-1:]


def put(path: Path, content: bytes) -> None:
    """A whole file or none: a reader sees no part of it."""
    arriving = path.with_name(f".{path.name}.{os.getpid()}")
    arriving.write_bytes(content)
    arriving.replace(path)
