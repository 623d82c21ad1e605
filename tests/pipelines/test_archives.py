"""Sources that come packed, of which classes or broken pictures are left out."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.archives import ENCODED
from pipelines.datasets import DataConfig
from pipelines.sources import Part, Pictures, has_test_part, read_pictures

COLOUR = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)  # (N, H, W, C)
LABELS = [2, 0, 1, 1, 0, 2]


def encoded(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


CELLS = [encoded(pixels) for pixels in COLOUR]


def read(name: str, root: Path, part: Part = "train", **more: Any) -> Pictures:
    return read_pictures(DataConfig(name=name, root=root, **more), part)


def write_tar(path: Path, cells: Sequence[bytes], labels: Sequence[int]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (cell, label) in enumerate(zip(cells, labels, strict=True)):
            for kind, content in (("png", cell), ("cls", str(label).encode()), ("json", b"{}")):
                member = tarfile.TarInfo(f"{path.stem}/{number:04d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_huggingface(
    folder: Path, cells: Sequence[bytes], labels: Sequence[int], names: tuple[str, str]
) -> None:
    """As ``Dataset.save_to_disk`` writes it: Arrow streams, and what they are in JSON."""
    folder.mkdir(parents=True)
    files = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    half = len(cells) // 2
    for file, part in zip(files, (slice(half), slice(half, None)), strict=True):
        image = [{"bytes": cell, "path": None} for cell in cells[part]]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = (pa.array(image, kind), pa.array(labels[part], pa.int64()))
        table = pa.table(dict(zip(names, columns, strict=True)))
        with pa.ipc.new_stream(str(folder / file), table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": file} for file in files]}
    (folder / "state.json").write_text(json.dumps(state))


def write(name: str, root: Path, cells: Sequence[bytes] = CELLS) -> None:
    """All pictures as the training part, the first two as the test part."""
    for part, end in (("train", len(cells)), ("test", 2)):
        if name == "webdataset":
            write_tar(root / f"{part}-000.tar", cells[: min(4, end)], LABELS[: min(4, end)])
            if part == "train":
                write_tar(root / "train-001.tar", cells[4:], LABELS[4:])
        else:
            write_huggingface(root / part, cells[:end], LABELS[:end], ("img", "fine_label"))


@pytest.mark.parametrize("name", ["webdataset", "huggingface"])
def test_packed_pictures_come_in_the_order_in_which_they_are_packed(
    tmp_path: Path, name: str
) -> None:
    write(name, tmp_path)
    train = read(name, tmp_path)
    np.testing.assert_array_equal(train.image, COLOUR.transpose(0, 3, 1, 2))
    assert train.label.tolist() == LABELS
    assert train.num_classes == 3
    np.testing.assert_array_equal(read(name, tmp_path, "test").image, train.image[:2])


def held_by(root: Path) -> set[str]:
    """The kinds of root of which a folder has the test part."""
    return {name for name in ENCODED if has_test_part(DataConfig(name=name, root=root))}


@pytest.mark.parametrize("name", ["webdataset", "huggingface"])
def test_a_packed_root_has_a_test_part_or_none(tmp_path: Path, name: str) -> None:
    assert held_by(tmp_path) == set()
    write(name, tmp_path)
    assert name in held_by(tmp_path)


@pytest.mark.parametrize("part", ["test", "val"])
def test_a_folder_s_test_part_has_either_name(tmp_path: Path, part: str) -> None:
    (tmp_path / part).mkdir()
    assert held_by(tmp_path) == {"folder"}


@pytest.mark.parametrize("name", ["webdataset", "huggingface"])
def test_some_classes_are_the_same_in_both_parts(tmp_path: Path, name: str) -> None:
    write(name, tmp_path)
    whole = read(name, tmp_path)
    seen = set()
    for seed in range(8):
        few = read(name, tmp_path, classes=2, classes_seed=seed)
        held = {
            int(whole.label[row])
            for row in range(6)
            if any(np.array_equal(whole.image[row], one) for one in few.image)
        }
        seen.add(tuple(sorted(held)))
        assert few.num_classes == 2
        assert few.label.tolist() == [sorted(held).index(one) for one in LABELS if one in held]
        tested = read(name, tmp_path, "test", classes=2, classes_seed=seed) if 2 in held else few
        assert len(tested.label) == len(few.label) or tested.num_classes == 2
    assert len(seen) > 1
    with pytest.raises(ValueError, match=r"data.classes is 4, and there are 3 classes"):
        read(name, tmp_path, classes=4)


def test_some_classes_of_what_comes_decoded(tmp_path: Path) -> None:
    whole = read_pictures(DataConfig(name="digits"), "train")
    few = read_pictures(DataConfig(name="digits", classes=3, classes_seed=1), "train")
    assert few.num_classes == 3
    assert set(few.label.tolist()) == {0, 1, 2}
    counts = np.bincount(whole.label)
    assert set(np.bincount(few.label).tolist()) <= set(counts.tolist())


def test_a_broken_picture_stops_or_is_skipped_and_listed(tmp_path: Path) -> None:
    cells = [*CELLS[:2], b"no picture", *CELLS[3:5], CELLS[5][:40]]
    write("webdataset", tmp_path, cells)
    with pytest.raises(ValueError, match=r"train-000\.tar train-000/0002\.png: a picture that can"):
        read("webdataset", tmp_path)
    train = read("webdataset", tmp_path, on_bad_image="skip")
    assert train.label.tolist() == [2, 0, 1, 0]
    np.testing.assert_array_equal(train.image, COLOUR[[0, 1, 3, 4]].transpose(0, 3, 1, 2))
    assert [place.split(":")[0].split()[-1] for place in train.skipped] == [
        "train-000/0002.png",
        "train-001/0001.png",
    ]


@pytest.mark.parametrize("bad", [False, True])
def test_pictures_in_a_file_are_those_in_memory(tmp_path: Path, bad: bool) -> None:
    cells = [*CELLS[:2], b"no picture" if bad else CELLS[2], *CELLS[3:]]
    write("webdataset", tmp_path, cells)
    here = read("webdataset", tmp_path, on_bad_image="skip")
    there = read("webdataset", tmp_path, on_bad_image="skip", spool=tmp_path / "spool")
    assert not isinstance(there.image, np.ndarray)
    np.testing.assert_array_equal(there.image[np.arange(len(here.label))], here.image)
    np.testing.assert_array_equal(there.label, here.label)
    assert there.digest == here.digest


def test_a_sample_without_its_label_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        member = tarfile.TarInfo("0001.png")
        member.size = len(CELLS[0])
        tar.addfile(member, io.BytesIO(CELLS[0]))
    with pytest.raises(ValueError, match=r"train.tar sample '0001' has \['png'\]; expected"):
        read("webdataset", tmp_path)


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no train/state\.json; save a DatasetDict there"):
        read("huggingface", tmp_path)
    with pytest.raises(ValueError, match=r"no train\*\.tar in"):
        read("webdataset", tmp_path)


def test_pictures_that_do_not_fit_into_memory_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("webdataset", tmp_path)
    monkeypatch.setattr("pipelines.memory.available_bytes", lambda: COLOUR.nbytes - 1)
    with pytest.raises(ValueError, match=r"6 pictures \(3, 5, 7\) would take .*set `data.spool`"):
        read("webdataset", tmp_path)
    assert len(read("webdataset", tmp_path, spool=tmp_path / "spool").label) == 6


def test_pictures_of_which_none_decodes_are_refused(tmp_path: Path) -> None:
    write("webdataset", tmp_path, [b"no picture"] * 6)
    with pytest.raises(ValueError, match=r"no picture can be decoded; the first: .*0000\.png"):
        read("webdataset", tmp_path, on_bad_image="skip")
