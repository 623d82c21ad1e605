"""Reads an epoch of small pictures and their teacher's logits from flat files.

Usage: python -m tests.pipelines.read_spool FOLDER ROWS [CAP], the last the bytes that it may take
beyond those that it has at its start. Prints the bytes in the files, and its peak beyond its start.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

from pipelines.config import RunConfig
from pipelines.data import Reader, TeacherRows
from pipelines.rows import FileRows, RowsWriter
from pipelines.sources import Pictures
from pipelines.strict import validated

CLASSES, BLOCK, BATCH = 100, 2000, 64


def filled(path: Path, count: int, block: Callable[[], np.ndarray]) -> FileRows:
    values = block()
    writer = RowsWriter(path, count, values.shape[1:], values.dtype)
    for start in range(0, count, BLOCK):
        writer.put(np.arange(start, start + BLOCK), values)
    return writer.close()


def reader_of(folder: Path, count: int) -> Reader:
    drawn = np.random.default_rng(0)
    augment = {"crop": 1, "flip": True}
    content = {
        "student": {"name": "convnet"},
        "data": {"name": "digits", "views": 1, "augment": augment},
        "epochs": 1,
        "batch_size": BATCH,
        "losses": {"ce": {}},
    }
    image = filled(
        folder / "image.npy",
        count,
        lambda: drawn.integers(0, 256, (BLOCK, 1, 32, 32), dtype=np.uint8),
    )
    logits = filled(
        folder / "logits.npy",
        count,
        lambda: drawn.standard_normal((BLOCK, CLASSES)).astype(np.float16),
    )
    pictures = Pictures(image, np.arange(count) % CLASSES, CLASSES)
    run = validated(RunConfig, content, where="noise")
    return Reader(run, pictures, {"teacher": TeacherRows([logits, logits], {})})


def check_held(cap: int) -> None:
    """The cap is one: what is read could not all be taken."""
    try:
        np.empty(cap, np.uint8)
    except MemoryError:
        return
    raise AssertionError(f"{cap} bytes could be taken at once, so there is no cap")


def main(folder: str, rows: str, *cap: str) -> None:
    torch.set_num_threads(1)
    next(reader_of(Path(folder), BLOCK).train(0))  # what the first call of everything needs
    start = psutil.Process().memory_info()
    for allowed in cap:
        most = start.data + int(allowed)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    reader = reader_of(Path(folder), int(rows))
    for batch in reader.train(0):
        assert batch.teachers["teacher"].logits.isfinite().all()
    for allowed in cap:
        check_held(int(allowed))
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start.rss
    print(sum(file.stat().st_size for file in Path(folder).iterdir()), peak)


if __name__ == "__main__":
    main(*sys.argv[1:])
