"""A cache is what the teacher says, written once: by view, by column, and only what is missing."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.cache.columns import half
from pipelines.cache.manifest import DONE, MANIFEST, cache_store, contents, is_complete
from pipelines.cache.storage import store_at
from pipelines.config import RunConfig
from pipelines.data import view_of
from pipelines.sources import Pictures, read_pictures, split
from pipelines.space import changed
from pipelines.views import normalised
from tests.pipelines.caches import (
    columns_for,
    files_of,
    pictures_of,
    read,
    rows_of_views,
    store_of,
    teacher_of,
    toy,
    write,
    written_here,
)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are written in this process: where it is not the actors that are tested."""
    monkeypatch.setattr("pipelines.cache.write.written", written_here)


@pytest.fixture
def run(workdir: Path) -> RunConfig:
    return toy()


@pytest.fixture
def pictures(run: RunConfig) -> Pictures:
    return pictures_of(run)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A cache in files of 100 rows, with one layer; tests work on copies of it."""
    return Path(write(toy(caches=str(tmp_path_factory.mktemp("caches")))).root)


@pytest.fixture
def folder(made: Path, run: RunConfig) -> Path:
    """A copy of the cache, where the run looks for it."""
    return Path(shutil.copytree(made, Path(run.caches) / made.name))


def test_rows_are_what_the_teacher_says_of_the_same_view(
    run: RunConfig, pictures: Pictures, folder: Path
) -> None:
    teacher, rows = teacher_of(run), read(run)
    train, validation = split(len(pictures.label), run.data)
    for number in range(3):
        image = view_of(run, pictures, train, number)
        with torch.no_grad():
            live = teacher(normalised(image, mean=run.data.mean, std=run.data.std))
        held = rows.outputs(number, train)
        close = {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(held.logits, live.logits, **close)
        for layer in ("block1", "embedding"):
            torch.testing.assert_close(held.features[layer], live.features[layer], **close)
    assert np.isfinite(rows.logits[0][validation]).all()
    assert np.isnan(rows.logits[1][validation]).all()


def test_plain_pyarrow_reads_a_view_and_its_pictures_can_be_checked(
    run: RunConfig, pictures: Pictures, folder: Path
) -> None:
    table = pq.read_table(folder / "logits" / "view=0002")
    logits = table["logits"].combine_chunks().to_numpy_ndarray()
    assert logits.shape == (table.num_rows, 10)
    assert logits.dtype == np.float16
    rows = table["sample_id"].to_numpy()
    np.testing.assert_array_equal(table["label"].to_numpy(), pictures.label[rows])
    image = view_of(run, pictures, rows, 2)
    assert table["view_crc"].to_pylist() == [zlib.crc32(one.numpy()) for one in image]


def test_plain_pyarrow_reads_all_views_of_a_column_as_one_table(folder: Path) -> None:
    table = pq.read_table(folder / "layers" / "block1")
    assert table.column_names == ["sample_id", "block1", "view"]
    assert table.num_rows == 400 + 2 * 320
    assert set(table["view"].to_pylist()) == {0, 1, 2}


def test_duckdb_reads_it_too(folder: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    table = duckdb.sql(
        f"select l.sample_id, l.logits, e.embedding from '{folder}/logits/*/*.parquet' l "
        f"join '{folder}/layers/embedding/*/*.parquet' e using (sample_id, view) "
        "where view = '0001' order by sample_id"
    ).fetchnumpy()
    assert len(table["sample_id"]) == 320
    plain = pq.read_table(folder / "logits" / "view=0001")["logits"].combine_chunks()
    np.testing.assert_array_equal(np.stack(table["logits"]), plain.to_numpy_ndarray())


def test_the_final_marker_lists_every_file_with_its_rows(folder: Path) -> None:
    listed = json.loads((folder / "logits" / "view=0001" / DONE).read_text())
    assert {name: file["rows"] for name, file in listed.items()} == {
        "part-00000.parquet": 100,
        "part-00001.parquet": 100,
        "part-00002.parquet": 100,
        "part-00003.parquet": 20,
    }
    assert all(len(file["sha256"]) == 64 for file in listed.values())


def test_the_manifest_says_what_made_it(folder: Path) -> None:
    held = json.loads((folder / MANIFEST).read_text())
    assert held["rows"] == 400
    assert held["made_with"]["torch"] == torch.__version__.partition("+")[0]
    assert set(held["content"]) >= {"schema", "pictures", "views", "teacher"}


@pytest.mark.usefixtures("without_ray")
def test_only_what_is_missing_is_written(run: RunConfig, folder: Path) -> None:
    before = files_of(folder)
    (folder / "logits" / "view=0001" / "part-00001.parquet").unlink()
    (folder / "logits" / "view=0001" / DONE).unlink()
    assert not is_complete(store_at(str(folder)), columns_for(run), 2)
    grown = changed(run, {"data.views": 3})
    assert write(grown) == store_at(str(folder))
    after = files_of(folder)
    assert is_complete(store_at(str(folder)), columns_for(run), 3)
    rewritten = {name for name in after if after[name] != before.get(name)}
    assert rewritten == {
        "logits/view=0001/part-00001.parquet",
        *(
            f"{column}/view=0003/part-{part:05d}.parquet"
            for column in ("logits", "layers/embedding", "layers/block1")
            for part in range(4)
        ),
    }


@pytest.mark.usefixtures("without_ray")
def test_a_new_layer_writes_that_layer_alone(run: RunConfig, folder: Path) -> None:
    before = files_of(folder)
    layers = ("block2@gap", "block1")
    write(run, layers)
    after = files_of(folder)
    assert {name: after[name] for name in before} == before
    assert {name.rpartition("/view=")[0] for name in after.keys() - before} == {"layers/block2@gap"}
    assert len(after) == len(before) + 12
    rows = read(run, layers)
    whole = read(run, ("block1",))
    everyone = np.arange(400)
    np.testing.assert_array_equal(
        rows.features["block1"][0][everyone], whole.features["block1"][0][everyone]
    )
    assert rows.features["block2@gap"][0][everyone].shape == (400, 16)


@pytest.mark.usefixtures("without_ray")
def test_what_is_added_must_be_of_the_pictures_that_the_cache_has_seen(
    run: RunConfig, folder: Path
) -> None:
    # as if another version of a library drew other pixels for the same view
    file = folder / "logits" / "view=0002" / "part-00001.parquet"
    table = pq.read_table(file)
    other = table["view_crc"].to_numpy() + 1
    pq.write_table(table.set_column(2, "view_crc", [other]), file)
    with pytest.raises(ValueError, match=r"view 2 is not as it was when .*part-00001.parquet"):
        write(run, ("block1", "block2@gap"))


@pytest.mark.usefixtures("local_ray")
def test_a_write_that_breaks_off_is_no_cache_until_it_is_resumed(run: RunConfig) -> None:
    def break_off(done: int, total: int, note: str) -> None:
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(run, watch=break_off)
    assert not is_complete(store_of(run), columns_for(run), 2)
    folder = Path(write(run).root)
    assert is_complete(store_of(run), columns_for(run), 2)
    for view, rows in enumerate(rows_of_views(run)):
        for column in ("logits", "layers/embedding", "layers/block1"):
            held = pq.read_table(folder / column / f"view={view:04d}")["sample_id"].to_pylist()
            assert held == rows


@pytest.mark.usefixtures("without_ray")
def test_a_file_with_rows_missing_is_refused(run: RunConfig, folder: Path) -> None:
    (folder / "logits" / "view=0001" / DONE).unlink()
    file = folder / "logits" / "view=0001" / "part-00000.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(ValueError, match=r"part-00000.parquet holds 99 rows instead of 100"):
        write(run)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"part-00000.parquet is no whole Parquet file"):
        write(run)


def test_a_reader_finds_files_that_changed_under_their_marker(run: RunConfig, folder: Path) -> None:
    file = folder / "logits" / "view=0001" / "part-00000.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(ValueError, match=r"part-00000.parquet has 99 rows instead of 100; remove"):
        read(run)
    file.unlink()
    with pytest.raises(ValueError, match=r"part-00000.parquet is gone; remove"):
        read(run)


def both(key: str, value: Any) -> dict[str, Any]:
    """A change of the data that a run and its teacher's run share."""
    return {"teacher.run.data." + key: value, "data." + key: value}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data.augment.crop": 2}, r"views is .*'crop': 1.*expected .*'crop': 2"),
        ({"data.view_seed": 5}, "views is"),
        (both("split_seed", 5), "split is"),
        (both("mean", [0.1]), "normalisation is"),
        (both("limit", 350), "pictures is"),
        ({"teacher.precision": "bf16"}, "precision is 'fp32', expected 'bf16'"),
        ({"teacher.run.student.params.width": 9}, "teacher is"),
    ],
)
def test_a_cache_of_something_else_is_refused_with_the_difference(
    run: RunConfig, folder: Path, change: dict[str, Any], named: str
) -> None:
    other = changed(run, {**change, "caches": str(folder)})
    seen = read_pictures(other.data, "train")
    with pytest.raises(ValueError, match=named):
        cache_store(other.caches, contents(other, seen, teacher_of(other)))


def test_numbers_beyond_float16_are_refused_by_name() -> None:
    for values in (torch.full((2, 3), 1e5), torch.tensor([[1.0, torch.nan]])):
        with pytest.raises(ValueError, match=r"teacher's 'block3' reaches (1e\+05|nan)"):
            half("block3", values)


@pytest.mark.usefixtures("local_ray")
def test_what_an_actor_cannot_do_is_said_in_one_line(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(run)
    with torch.no_grad():
        teacher.net.get_submodule("classifier").weight.fill_(1e6)
    monkeypatch.setattr("tests.pipelines.caches.teacher_of", lambda *_: teacher)
    with pytest.raises(RuntimeError, match=r"^the cache could not be written: .* float16"):
        write(run)
    assert not is_complete(store_of(run), columns_for(run), 0)


def test_rows_that_do_not_fit_into_memory_are_refused_before_they_are_read(
    run: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read(run)
    held = [*rows.logits, *(view for layer in rows.features.values() for view in layer)]
    num_bytes = sum(np.asarray(view).nbytes for view in held)
    monkeypatch.setattr("pipelines.memory.available_bytes", lambda: num_bytes)
    read(run)
    monkeypatch.setattr("pipelines.memory.available_bytes", lambda: num_bytes - 1)
    with pytest.raises(ValueError, match=r"cache .* would take .*; set `data.spool` to a folder"):
        read(run)
    assert read(toy(data__spool="spool")).logits[0][np.arange(3)].shape == (3, 10)
