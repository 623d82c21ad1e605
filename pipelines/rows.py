"""Rows by number, whether they lie in memory or in a flat file, in full or in less."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

# the least mass of all classes that are not kept: what float32's largest ``lse`` cannot tell from 0
LEAST_REST = float(np.finfo(np.float32).eps)


class Rows(Protocol):
    """Anything that gives an array of some rows, which is the caller's own."""

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class FileRows:
    """Rows of a ``.npy`` file, read one by one where they are asked for.

    By ``pread`` rather than a memory map, whose pages count as the process's own until the kernel
    takes them back: memory does not grow with the number of rows. All readers of a machine share
    its page cache.
    """

    path: Path
    offset: int  # bytes before the first row
    shape: tuple[int, ...]  # of all rows, as of an array
    dtype: str

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        numbers = range(self.shape[0])[rows] if isinstance(rows, slice) else rows.tolist()
        taken = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        length = prod(self.shape[1:]) * taken.itemsize
        flat = memoryview(taken.reshape(-1).view(np.uint8))
        file = os.open(self.path, os.O_RDONLY)
        try:
            for place, row in enumerate(numbers):
                piece = flat[place * length : (place + 1) * length]
                if os.preadv(file, [piece], self.offset + row * length) != length:
                    raise IndexError(f"{self.path} has {self.shape[0]} rows, asked for row {row}")
        finally:
            os.close(file)
        return taken


def open_rows(path: Path) -> FileRows:
    """The rows of a ``.npy`` file."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return FileRows(path.absolute(), file.tell(), shape, dtype.str)


class RowsWriter:
    """Writes a ``.npy`` file of ``count`` rows, ascending; those left out are NaN, or 0 of whole
    numbers. It is in its place when it is closed, and not before.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self.count, self.shape, self.dtype = path, count, shape, dtype
        self.next = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.arriving = path.with_name(f".{path.name}.{os.getpid()}")
        self.file = self.arriving.open("wb")
        header = {"descr": dtype.str, "fortran_order": False, "shape": (count, *shape)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def put(self, rows: np.ndarray, values: np.ndarray) -> None:
        block = blank((int(rows[-1]) + 1 - self.next, *self.shape), self.dtype)
        block[rows - self.next] = values
        self.file.write(block.data)
        self.next += len(block)

    def close(self) -> FileRows:
        self.file.write(blank((self.count - self.next, *self.shape), self.dtype).data)
        self.file.close()
        self.arriving.replace(self.path)
        return open_rows(self.path)


def blank(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Rows that are not there."""
    return np.full(shape, np.nan if dtype.kind == "f" else 0, dtype)


@dataclass(frozen=True)
class AffineRows:
    r"""Logits of eight bits each, between the least and the greatest of their row.

    .. math:: z = l + \frac{q}{255} (h - l)
    """

    codes: Rows  # (N, K) uint8
    low: Rows  # (N,) float16
    high: Rows  # (N,) float16

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        low, high = (held[rows].astype(np.float32)[:, None] for held in (self.low, self.high))
        return low + self.codes[rows] * ((high - low) / 255)


@dataclass(frozen=True)
class TopRows:
    r"""Logits of which the greatest, the label's and the sum of all exponentials are kept.

    The others share the mass that is left alike, so that every loss can read them:

    .. math:: z_k = \log \frac{e^{\mathrm{lse}} - \sum_{j \in S} e^{z_j}}{K - |S|},
        \quad k \notin S

    Exact are the kept logits and the mass of all others together, at temperature 1.
    """

    classes: Rows  # (N, k)
    kept: Rows  # (N, k) float16
    of_label: Rows  # (N,) float16
    lse: Rows  # (N,) float32
    label: np.ndarray  # (N,)
    num_classes: int

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        classes, label = self.classes[rows].astype(np.int64), self.label[rows][:, None]
        kept, of_label = (held[rows].astype(np.float32) for held in (self.kept, self.of_label))
        lse = self.lse[rows].astype(np.float32)
        apart = ~(classes == label).any(axis=1)  # the label is not among the greatest
        mass = np.exp(kept - lse[:, None]).sum(axis=1) + apart * np.exp(of_label - lse)
        others = np.maximum(self.num_classes - classes.shape[1] - apart, 1)
        rest = lse + np.log(np.maximum(1 - mass, LEAST_REST) / others)
        logits = np.repeat(rest[:, None], self.num_classes, axis=1)
        np.put_along_axis(logits, label, of_label[:, None], axis=1)
        np.put_along_axis(logits, classes, kept, axis=1)
        return logits
