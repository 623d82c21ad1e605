"""A Parquet file of a stranger: what would run code is not read, and the message names the file."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.extensions import ArrowPythonObjectArray, ArrowPythonObjectType

from pipelines.cache.inspection import caches_in, inspected
from pipelines.cache.storage import store_at
from pipelines.config import RunConfig
from pipelines.datasets import DataConfig
from pipelines.parquet import read_parquet, refuse_objects
from pipelines.sources import read_pictures
from tests.pipelines.caches import read, toy, write, written_here


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.sprung),)


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """The folder that is there once a trap was unpickled."""
    return tmp_path / "sprung"


def traps(sprung: Path, count: int) -> pa.Array:
    """A column whose values Ray Data, once it is imported, unpickles when they are looked at."""
    return ArrowPythonObjectArray.from_objects([Trap(sprung)] * count)


def test_the_trap_works(tmp_path: Path, sprung: Path) -> None:
    pq.write_table(pa.table({"logits": traps(sprung, 1)}), tmp_path / "trap.parquet")
    assert not sprung.exists()
    pq.read_table(tmp_path / "trap.parquet")["logits"].combine_chunks().to_numpy()
    assert sprung.exists()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr("pipelines.cache.write.written", written_here)
    run = toy(caches=str(tmp_path / "caches"), data__views=0, data__augment={})
    write(run)
    return run


def one_file(run: RunConfig) -> Path:
    return min(Path(run.caches).glob("*/logits/view=0000/*.parquet"))


def test_a_cache_whose_column_holds_code_is_refused(cached: RunConfig, sprung: Path) -> None:
    file = one_file(cached)
    table = pq.read_table(file)
    place = table.column_names.index("logits")
    pq.write_table(table.set_column(place, "logits", traps(sprung, len(table))), file)
    with pytest.raises(ValueError, match=rf"^cache file {file}: column 'logits' .* could run code"):
        read(cached)
    (store,) = caches_in(store_at(cached.caches))
    with pytest.raises(ValueError, match=rf"^cache file {file}: column 'logits' .* could run code"):
        inspected(store)
    assert not sprung.exists()


def test_a_cache_file_that_is_a_pickle_is_refused(cached: RunConfig, sprung: Path) -> None:
    file = one_file(cached)
    file.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match=rf"^cache file {file} cannot be read as Parquet"):
        read(cached)
    assert not sprung.exists()


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_data_set_whose_column_holds_code_is_refused(
    tmp_path: Path, sprung: Path, column: str
) -> None:
    cells = pa.array([{"bytes": b"", "path": ""}] * 2)
    table = {"image": cells, "label": pa.array([0, 1]), column: traps(sprung, 2)}
    pq.write_table(pa.table(table), tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=rf"train-0.parquet: column '{column}' .* could run code"):
        read_pictures(DataConfig(name="parquet", root=tmp_path), "train")
    assert not sprung.exists()


KIND = ArrowPythonObjectType()


@pytest.mark.parametrize(
    "kind", [pa.struct([("bytes", KIND)]), pa.list_(KIND), pa.dictionary(pa.int32(), KIND)], ids=str
)
def test_code_within_another_column_is_found(kind: pa.DataType) -> None:
    with pytest.raises(ValueError, match=r"^it: column 'image' .* could run code"):
        refuse_objects(pa.schema([("image", kind)]), name="it")


def test_plain_columns_and_tensors_are_read(tmp_path: Path) -> None:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((2, 3), np.float16))
    table = pa.table({"logits": tensors, "label": [1, 2]})
    pq.write_table(table, tmp_path / "it.parquet")
    assert read_parquet(tmp_path / "it.parquet", name="it").equals(table)
    with pytest.raises(ValueError, match=r"^it lacks the columns \['image'\]"):
        read_parquet(tmp_path / "it.parquet", name="it", columns=["image"])
