"""What is in a cache is told, checked against its checksums and its teacher, and cleaned up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.cache.forward import PartWriter
from pipelines.cache.inspection import (
    caches_in,
    damaged_files,
    greatest_differences,
    inspected,
    prune,
)
from pipelines.cache.manifest import DONE, is_complete
from pipelines.cache.storage import Store, store_at
from pipelines.config import RunConfig
from tests.pipelines.caches import (
    LAYERS,
    columns_for,
    pictures_of,
    read,
    teacher_of,
    toy,
    write,
    written_here,
)


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cache.write.written", written_here)


@pytest.fixture
def run(workdir: Path) -> RunConfig:
    return toy()


def writer_of(run: RunConfig, store: Store, seed: int = 7) -> PartWriter:
    teacher = teacher_of(run)
    if seed != 7:
        torch.manual_seed(seed)
        torch.nn.init.normal_(teacher.net.get_submodule("classifier").weight, std=0.1)
    return PartWriter(run, pictures_of(run), teacher, store, device=torch.device("cpu"))


def differences(run: RunConfig, store: Store, seed: int = 7) -> dict[str, float]:
    drawn = np.random.default_rng(0)
    return greatest_differences(store, columns_for(run), writer_of(run, store, seed), drawn)


def test_info_counts_rows_and_bytes_and_the_teacher_s_right_answers(run: RunConfig) -> None:
    store = write(run)
    info = inspected(store)
    assert {column.folder: (column.views, column.rows) for column in info.columns} == {
        "logits": (3, 400 + 2 * 320),
        "layers/block1": (3, 1040),
        "layers/embedding": (3, 1040),
    }
    for column in info.columns:
        files = Path(store.root).glob(f"{column.folder}/*/part-*")
        assert column.num_bytes == sum(path.stat().st_size for path in files)
        assert column.bytes_per_row == column.num_bytes / 1040
    right = read(run).logits[0][np.arange(400)].argmax(axis=1) == pictures_of(run).label
    assert info.accuracy == pytest.approx(right.mean())
    assert info.unfinished == []


@pytest.mark.parametrize("logits", ["float16", "uint8", {"top": 3}])
def test_what_is_written_verifies_in_every_format(run: RunConfig, logits: Any) -> None:
    run = toy(teacher__logits=logits)
    store = write(run)
    assert damaged_files(store) == []
    assert max(differences(run, store).values()) < 1
    another = differences(run, store, seed=3)
    assert another[columns_for(run)[0].folder] > 1
    assert another["layers/embedding"] < 1  # only the classifier is another one


def test_other_pictures_are_found_by_their_checksums(run: RunConfig) -> None:
    store = write(run)
    for path in Path(store.root).glob("logits/*/part-*"):
        table = pq.read_table(path)
        other = table["view_crc"].to_numpy() ^ 1
        place = table.column_names.index("view_crc")
        pq.write_table(table.set_column(place, "view_crc", [other]), path)
    assert differences(run, store)["logits"] == np.inf


def test_a_file_that_changed_or_is_gone_is_found(run: RunConfig) -> None:
    store = write(run)
    root = Path(store.root)
    changed_file = root / "logits" / "view=0001" / "part-00001.parquet"
    content = bytearray(changed_file.read_bytes())
    content[len(content) // 2] ^= 1
    changed_file.write_bytes(content)
    gone = root / "layers" / "embedding" / "view=0002" / "part-00000.parquet"
    gone.unlink()
    assert sorted(damaged_files(store)) == sorted([str(changed_file), str(gone)])


def test_prune_removes_what_was_never_finished_and_nothing_else(run: RunConfig) -> None:
    root = Path(write(run).root)
    (root / "layers" / "block1" / "view=0002" / DONE).unlink()
    never = shutil.copytree(root, root.parent / "never")
    for marker in never.glob(f"**/{DONE}"):
        marker.unlink()
    caches = caches_in(store_at(run.caches))
    assert [store.name for store in caches] == sorted([root.name, "never"])
    removed = [name for store in caches for name in prune(store)]
    assert sorted(removed) == sorted([str(root / "layers" / "block1" / "view=0002"), str(never)])
    assert not never.exists()
    assert is_complete(store_at(str(root)), columns_for(run, ()), 2)
    assert is_complete(write(run), columns_for(run, LAYERS), 2)
    assert prune(store_at(str(root))) == []


def test_nothing_is_pruned_of_what_another_process_writes(run: RunConfig) -> None:
    store = write(run)
    (Path(store.root) / "logits" / "view=0001" / DONE).unlink()
    with store.alone(lambda: None), pytest.raises(ValueError, match="written by another process"):
        prune(store_at(store.root))
    assert (Path(store.root) / "logits" / "view=0001").is_dir()


def test_leftovers_of_a_killed_writer_go_when_its_view_is_finished(run: RunConfig) -> None:
    folder = Path(write(run).root) / "logits" / "view=0001"
    (folder / DONE).unlink()
    (folder / ".part-00001.parquet.0123").write_bytes(b"half")
    write(run)
    assert not list(folder.glob(".*"))
