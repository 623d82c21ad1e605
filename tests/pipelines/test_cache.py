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

from kdcore.taps import Tapped
from pipelines import cache
from pipelines.build import build_teacher
from pipelines.config import RunConfig
from pipelines.data import view_of
from pipelines.loading import load
from pipelines.sources import Pictures, read_pictures, split
from pipelines.space import changed
from pipelines.views import normalised

pytestmark = pytest.mark.usefixtures("local_ray")


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture
def run(toy_run: Path, workdir: Path) -> RunConfig:
    loaded = load(toy_run)
    assert isinstance(loaded, RunConfig)
    return loaded


@pytest.fixture
def pictures(run: RunConfig) -> Pictures:
    return read_pictures(run.data, "train")


def teacher_of(run: RunConfig, pictures: Pictures, layers: tuple[str, ...] = ("block1",)) -> Tapped:
    assert run.teacher is not None
    torch.manual_seed(7)
    return build_teacher(run.teacher, pictures, layers)


def write(run: RunConfig, pictures: Pictures, watch: Any = quiet) -> Path:
    teacher = teacher_of(run, pictures)
    folder = cache.cache_folder(run, cache.contents(run, pictures, teacher))
    cache.write_cache(run, pictures, teacher, folder, watch)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in files of 100 rows, with one layer; tests work on copies of it."""
    loaded = load(Path(__file__).parent / "toy.yaml")
    assert isinstance(loaded, RunConfig)
    run = changed(loaded, {"caches": str(tmp_path_factory.mktemp("caches"))})
    pictures = read_pictures(run.data, "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "ROWS_PER_FILE", 100)
        return write(run, pictures)


@pytest.fixture
def folder(made: Path, run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the cache, where the run looks for it."""
    monkeypatch.setattr(cache, "ROWS_PER_FILE", 100)
    return Path(shutil.copytree(made, run.caches / made.name))


def files_of(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.glob("*/*.parquet")
    }


def test_rows_are_what_the_teacher_says_of_the_same_view(
    run: RunConfig, pictures: Pictures, folder: Path
) -> None:
    teacher = teacher_of(run, pictures)
    count = len(pictures.label)
    rows = cache.read_cache(folder, views=2, layers=("block1", "embedding"), count=count)
    train, validation = split(count, run.data)
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
    table = pq.read_table(folder / "view=0002")
    logits = table["logits"].combine_chunks().to_numpy_ndarray()
    assert logits.shape == (table.num_rows, 10)
    assert logits.dtype == np.float16
    rows = table["sample_id"].to_numpy()
    np.testing.assert_array_equal(table["label"].to_numpy(), pictures.label[rows])
    image = view_of(run, pictures, rows, 2)
    assert table["view_crc"].to_pylist() == [zlib.crc32(one.numpy()) for one in image]


def test_the_final_marker_lists_every_file_with_its_rows(folder: Path) -> None:
    listed = json.loads((folder / "view=0001" / cache.DONE).read_text())
    assert {name: file["rows"] for name, file in listed.items()} == {
        "part-00000.parquet": 100,
        "part-00001.parquet": 100,
        "part-00002.parquet": 100,
        "part-00003.parquet": 20,
    }
    assert all(len(file["sha256"]) == 64 for file in listed.values())


def test_only_what_is_missing_is_written(run: RunConfig, pictures: Pictures, folder: Path) -> None:
    before = files_of(folder)
    (folder / "view=0001" / "part-00001.parquet").unlink()
    (folder / "view=0001" / cache.DONE).unlink()
    assert not cache.is_complete(folder, 2)
    grown = changed(run, {"data.views": 3})
    assert write(grown, pictures) == folder
    after = files_of(folder)
    assert cache.is_complete(folder, 3)
    rewritten = {name for name in after if after[name] != before.get(name)}
    assert rewritten == {
        "view=0001/part-00001.parquet",
        *(f"view=0003/part-{part:05d}.parquet" for part in range(4)),
    }


def test_a_write_that_breaks_off_is_no_cache_until_it_is_resumed(
    run: RunConfig, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ROWS_PER_FILE", 100)

    def break_off(done: int, total: int) -> None:
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(run, pictures, break_off)
    (folder,) = run.caches.iterdir()
    assert not cache.is_complete(folder, 2)
    assert write(run, pictures) == folder
    assert cache.is_complete(folder, 2)
    train, _ = split(len(pictures.label), run.data)
    for view, rows in enumerate((np.arange(len(pictures.label)), train, train)):
        held = pq.read_table(folder / f"view={view:04d}")["sample_id"].to_pylist()
        assert sorted(held) == rows.tolist()


def test_a_file_with_rows_missing_is_refused(
    run: RunConfig, pictures: Pictures, folder: Path
) -> None:
    file = folder / "view=0001" / "part-00000.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(ValueError, match=r"part-00000.parquet holds 99 rows instead of 100"):
        write(run, pictures)


def test_a_cache_with_more_layers_serves_a_run_that_reads_fewer(
    run: RunConfig, pictures: Pictures, folder: Path
) -> None:
    content = cache.contents(run, pictures, teacher_of(run, pictures, ()))
    assert cache.cache_folder(run, content) == folder


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
        cache.cache_folder(other, cache.contents(other, seen, teacher_of(other, seen)))


def test_numbers_beyond_float16_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"teacher's 'block3' reaches 1e\+05"):
        cache._half("block3", torch.full((2, 3), 1e5))


def test_what_an_actor_cannot_do_is_said_in_one_line(run: RunConfig, pictures: Pictures) -> None:
    teacher = teacher_of(run, pictures)
    with torch.no_grad():
        teacher.net.get_submodule("classifier").weight.fill_(1e6)
    folder = cache.cache_folder(run, cache.contents(run, pictures, teacher))
    with pytest.raises(RuntimeError, match=r"^the cache could not be written: .* float16"):
        cache.write_cache(run, pictures, teacher, folder, quiet)
    assert not cache.is_complete(folder, 0)
