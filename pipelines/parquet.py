"""Parquet files of anyone: as tables of plain columns, of which none is unpickled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(
    file: Path | pa.Buffer, *, name: object, columns: Sequence[str] | None = None
) -> pa.Table:
    """The columns of a file, which messages call ``name``.

    Raises ValueError for what is no Parquet file, lacks columns, or as ``refuse_objects`` does.
    """
    source = str(file) if isinstance(file, Path) else pa.BufferReader(file)
    try:
        with pq.ParquetFile(source) as opened:
            missing = sorted(set(columns or ()) - set(opened.schema_arrow.names))
            table = None if missing else opened.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        words = str(error).splitlines()[0]
        raise ValueError(f"{name} cannot be read as Parquet: {words}") from None
    if table is None:
        raise ValueError(f"{name} lacks the columns {missing}")
    refuse_objects(table.schema, name=name)
    return table


def refuse_objects(schema: pa.Schema, *, name: object) -> None:
    """Raise ValueError for a column of a kind whose values are made by code, as unpickling is.

    Ray Data registers such a kind with pyarrow when it is imported: to look at a value is then to
    run what the file says.
    """
    strange = [field.name for field in schema if _is_made_by_code(field.type)]
    if strange:
        kind = schema.field(strange[0]).type
        raise ValueError(
            f"{name}: column {strange[0]!r} is of type {kind}, expected plain values; reading it "
            "could run code, so it is not read"
        )


def _is_made_by_code(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return not isinstance(kind, pa.FixedShapeTensorType)
    if pa.types.is_dictionary(kind):
        return _is_made_by_code(kind.value_type)
    return any(_is_made_by_code(kind.field(place).type) for place in range(kind.num_fields))
