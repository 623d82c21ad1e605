"""What one column of a cache holds: of a teacher's outputs to Parquet, and back to rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kdcore.taps import EMBEDDING, Tapped
from kdcore.types import Outputs
from pipelines.formats import LogitsFormat, TopConfig
from pipelines.rows import AffineRows, Rows, TopRows
from pipelines.sources import Pictures

LAYERS, TRACE = "layers", "trace"  # the latter of a graphical model's runs
SAMPLE, LABEL, CRC = "sample_id", "label", "view_crc"
LEVELS = 255  # of eight bits, from the least logit to the greatest


@dataclass(frozen=True)
class Column(ABC):
    """One thing that a teacher says, in a folder of its own: nothing else is written with it."""

    folder: str

    @abstractmethod
    def encoded(self, outputs: Outputs, label: np.ndarray) -> dict[str, pa.Array]:
        """Some rows of a teacher's outputs as Parquet columns."""

    @abstractmethod
    def rows(self, parts: Mapping[str, Rows], pictures: Pictures) -> Rows:
        """The rows that a reader wants, of what stands in the Parquet columns."""


@dataclass(frozen=True)
class LayerColumn(Column):
    """The feature of one layer in half precision."""

    layer: str

    def encoded(self, outputs: Outputs, label: np.ndarray) -> dict[str, pa.Array]:
        return {self.layer: as_tensors(half(self.layer, outputs.features[self.layer]))}

    def rows(self, parts: Mapping[str, Rows], pictures: Pictures) -> Rows:
        return parts[self.layer]


@dataclass(frozen=True)
class LogitsColumn(Column):
    """All logits in half precision."""

    def encoded(self, outputs: Outputs, label: np.ndarray) -> dict[str, pa.Array]:
        return {"logits": as_tensors(half("logits", outputs.logits))}

    def rows(self, parts: Mapping[str, Rows], pictures: Pictures) -> Rows:
        return parts["logits"]


@dataclass(frozen=True)
class AffineColumn(Column):
    """All logits in eight bits, as ``AffineRows`` reads them."""

    def encoded(self, outputs: Outputs, label: np.ndarray) -> dict[str, pa.Array]:
        logits = half("logits", outputs.logits).astype(np.float32)
        low, high = logits.min(axis=1), logits.max(axis=1)
        step = np.where(high > low, (high - low) / LEVELS, 1)
        codes = np.round((logits - low[:, None]) / step[:, None]).astype(np.uint8)
        ends = {"low": low.astype(np.float16), "high": high.astype(np.float16)}
        return {"logits": as_tensors(codes)} | {name: pa.array(end) for name, end in ends.items()}

    def rows(self, parts: Mapping[str, Rows], pictures: Pictures) -> Rows:
        return AffineRows(parts["logits"], parts["low"], parts["high"])


@dataclass(frozen=True)
class TopColumn(Column):
    """The greatest logits and what is left of the others, as ``TopRows`` reads them."""

    top: int

    def encoded(self, outputs: Outputs, label: np.ndarray) -> dict[str, pa.Array]:
        # the sum of the rounded ones, or what is left for the others would be a rounding error
        logits = torch.from_numpy(half("logits", outputs.logits)).double()
        kept, classes = logits.topk(self.top, dim=1)
        narrow = np.uint16 if logits.shape[1] <= np.iinfo(np.uint16).max + 1 else np.uint32
        of_label = logits.gather(1, torch.from_numpy(label)[:, None])[:, 0]
        return {
            "classes": as_tensors(classes.numpy().astype(narrow)),
            "logits": as_tensors(kept.numpy().astype(np.float16)),
            "label_logit": pa.array(of_label.numpy().astype(np.float16)),
            "lse": pa.array(logits.logsumexp(dim=1).numpy().astype(np.float32)),
        }

    def rows(self, parts: Mapping[str, Rows], pictures: Pictures) -> Rows:
        named = (parts[name] for name in ("classes", "logits", "label_logit", "lse"))
        return TopRows(*named, pictures.label, pictures.num_classes)


def logits_column(kept: LogitsFormat) -> Column:
    """The column of a teacher's logits in this format."""
    if isinstance(kept, TopConfig):
        return TopColumn(f"logits-top{kept.top}", kept.top)
    return LogitsColumn("logits") if kept == "float16" else AffineColumn("logits-uint8")


def layer_column(layer: str) -> LayerColumn:
    return LayerColumn(f"{LAYERS}/{layer}", layer)


def columns_of(kept: LogitsFormat, teacher: Tapped) -> tuple[Column, ...]:
    """What a cache must hold of a teacher: its logits, its embedding and the layers it taps."""
    layers = sorted({EMBEDDING, *teacher.layers})
    return (logits_column(kept), *(layer_column(layer) for layer in layers))


def half(name: str, values: torch.Tensor) -> np.ndarray:
    """Half precision; ValueError for numbers that it does not hold."""
    held = values.float().cpu().contiguous().numpy()
    if not np.abs(held).max() <= np.finfo(np.float16).max:
        raise ValueError(
            f"the teacher's {name!r} reaches {np.abs(held).max():.3g}, more than float16 holds "
            "(65504): leave this layer out, or hear the teacher live"
        )
    return held.astype(np.float16)


def to_parquet(table: pa.Table) -> pa.Buffer:
    """A whole file of one row group."""
    # Parquet has no integers below 32 bits: as indices of their dictionary they take as many bits
    # as they need. Of real numbers a dictionary would be a second copy.
    whole = [f"{field.name}.list.element" for field in table.schema if _holds_integers(field.type)]
    stream = pa.BufferOutputStream()
    pq.write_table(
        table,
        stream,
        compression="zstd",
        use_dictionary=[LABEL, *whole],
        column_encoding={SAMPLE: "DELTA_BINARY_PACKED"},
    )
    return stream.getvalue()


def part_arrays(table: pa.Table) -> dict[str, np.ndarray]:
    """Every column of a file but those that name the rows, as one array each."""
    return {
        name: _array(table[name].combine_chunks())
        for name in table.column_names
        if name not in (SAMPLE, LABEL, CRC)
    }


def _holds_integers(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.FixedShapeTensorType) and pa.types.is_integer(kind.value_type)


def _array(column: pa.Array) -> np.ndarray:
    if isinstance(column, pa.FixedShapeTensorArray):
        return column.to_numpy_ndarray()
    return column.to_numpy(zero_copy_only=False)


def as_tensors(values: np.ndarray) -> pa.FixedShapeTensorArray:
    """Rows of arrays of one shape."""
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
