"""Every source ends as one array of pixels and one of labels, or says what is wrong and where."""

from __future__ import annotations

import io
import os
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.datasets import DataConfig, OtherData
from pipelines.sources import Part, Pictures, has_test_part, read_pictures, split

KD_DATA = Path(os.environ.get("KD_DATA", Path(__file__).parents[3] / "shared" / "data"))

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (6, 5, 7), dtype=np.uint8)  # (N, H, W)
COLOUR = RANDOM.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)  # (N, H, W, C)
LABELS = [2, 0, 1, 1, 0, 2]


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **({"lossless": True} if form == "WEBP" else {}))
    return stream.getvalue()


def write_parquet(path: Path, cells: Sequence[bytes | None], labels: Sequence[int]) -> None:
    """As Hugging Face's datasets write pictures, in several row groups."""
    image = [{"bytes": cell, "path": f"{number}.png"} for number, cell in enumerate(cells)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(image, kind), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, row_group_size=2)


def read(name: str, root: Path | None = None, part: Part = "train", **more: Any) -> Pictures:
    return read_pictures(DataConfig(name=name, root=root, **more), part)


def channels_first(pictures: np.ndarray) -> np.ndarray:
    return pictures.transpose(0, 3, 1, 2) if pictures.ndim == 4 else pictures[:, None]


# --- digits -----------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_each_in_one_part() -> None:
    from sklearn.datasets import load_digits

    train, test = read("digits"), read("digits", part="test")
    assert (len(train.label), len(test.label)) == (1438, 359)
    table = load_digits()
    known = zip(table.images, table.target.tolist(), strict=True)
    held = [*zip(train.image, train.label, strict=True), *zip(test.image, test.label, strict=True)]
    # 16 grey levels to 255: the rounding is undone exactly
    assert Counter((np.round(pixels[0] / (255 / 16)).tobytes(), int(y)) for pixels, y in held) == (
        Counter((pixels.tobytes(), y) for pixels, y in known)
    )
    assert train.image.dtype == np.uint8
    assert train.image.max() == 255
    assert train.num_classes == test.num_classes == 10
    assert set(test.label.tolist()) == set(range(10))


def test_digits_are_the_same_next_year() -> None:
    # whoever changes these makes the caches and the finished runs of digits stale
    assert read("digits").label[:12].tolist() == [0, 1, 3, 5, 7, 9, 0, 3, 4, 5, 6, 7]
    assert read("digits", part="test").label[:12].tolist() == [2, 4, 6, 8, 1, 2, 3, 8, 0, 0, 3, 3]


def test_digits_grow_to_any_size() -> None:
    pictures = read("digits", size=16)
    assert pictures.image.shape == (1438, 1, 16, 16)
    small = pictures.image.reshape(1438, 8, 2, 8, 2).mean(axis=(2, 4))
    assert np.corrcoef(small.ravel(), read("digits").image.ravel())[0, 1] > 0.95
    np.testing.assert_array_equal(pictures.label, read("digits").label)


# --- parquet ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize("pictures", [GREY, COLOUR], ids=["grey", "colour"])
def test_parquet_files_are_read_in_order(tmp_path: Path, form: str, pictures: np.ndarray) -> None:
    if form == "WEBP":  # has no grey: a picture of three equal channels
        pictures = pictures if pictures.ndim == 4 else np.stack([pictures] * 3, axis=-1)
    cells = [encoded(pixels, form) for pixels in pictures]
    write_parquet(tmp_path / "train-00001-of-00002.parquet", cells[4:], LABELS[4:])
    write_parquet(tmp_path / "train-00000-of-00002.parquet", cells[:4], LABELS[:4])
    write_parquet(tmp_path / "test.parquet", cells[:1], [1])
    train = read("parquet", tmp_path)
    np.testing.assert_array_equal(train.image, channels_first(pictures))
    assert train.label.tolist() == LABELS
    assert train.label.dtype == np.int64
    assert train.num_classes == 3
    assert len(read("parquet", tmp_path, "test").label) == 1


def test_a_palette_and_a_transparent_picture_become_colour(tmp_path: Path) -> None:
    palette, transparent = io.BytesIO(), io.BytesIO()
    Image.fromarray(COLOUR[0]).quantize(4).save(palette, "PNG")
    Image.fromarray(COLOUR[1]).convert("RGBA").save(transparent, "PNG")
    write_parquet(tmp_path / "train.parquet", [palette.getvalue(), transparent.getvalue()], [0, 1])
    train = read("parquet", tmp_path)
    assert train.image.shape == (2, 3, 5, 7)
    np.testing.assert_array_equal(train.image[1], COLOUR[1].transpose(2, 0, 1))


def test_a_root_without_the_part_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [encoded(GREY[0])], [0])
    with pytest.raises(ValueError, match=r"no test\*\.parquet in .*; data\.root should be"):
        read("parquet", tmp_path, "test")
    with pytest.raises(ValueError, match=r"data\.root .*nowhere is not a folder"):
        read("parquet", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"data\.name 'parquet' needs data\.root"):
        read("parquet")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a"], "fine_label": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet lacks the columns \['label'\]"):
        read("parquet", tmp_path)


def test_an_image_column_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    cells = pa.array([encoded(GREY[0])], pa.binary())
    pq.write_table(pa.table({"image": cells, "label": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet.*image"):
        read("parquet", tmp_path)


@pytest.mark.parametrize("cell", [b"", b"no picture", encoded(GREY[0])[:40], None])
def test_bytes_that_do_not_decode_are_named_by_file_and_row(
    tmp_path: Path, cell: bytes | None
) -> None:
    good = encoded(GREY[0])
    write_parquet(tmp_path / "train-0.parquet", [good] * 3, [0, 1, 2])
    write_parquet(tmp_path / "train-1.parquet", [good] * 3 + [cell, good], [0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match=r"train-1\.parquet row 3: a picture that cannot be deco"):
        read("parquet", tmp_path)


def test_pictures_of_two_sizes_need_a_size(tmp_path: Path) -> None:
    cells = [encoded(COLOUR[0]), encoded(COLOUR[1]), encoded(COLOUR[2][:4])]
    write_parquet(tmp_path / "train.parquet", cells, [0, 1, 2])
    message = (
        r"row 2 is \(C, H, W\) = \(3, 4, 7\), the first picture is \(3, 5, 7\); give data.size"
    )
    with pytest.raises(ValueError, match=message):
        read("parquet", tmp_path)
    assert read("parquet", tmp_path, size=6).image.shape == (3, 3, 6, 6)


def test_a_resized_picture_is_pillow_s_and_one_of_that_size_is_itself(tmp_path: Path) -> None:
    square = COLOUR[0][:, :5]
    write_parquet(tmp_path / "train.parquet", [encoded(square), encoded(COLOUR[1])], [0, 1])
    image = read("parquet", tmp_path, size=5).image
    np.testing.assert_array_equal(image[0], square.transpose(2, 0, 1))
    resized = Image.fromarray(COLOUR[1]).resize((5, 5), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(image[1], np.asarray(resized).transpose(2, 0, 1))


def test_grey_among_colour_is_refused_with_advice_that_helps(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [encoded(COLOUR[0]), encoded(GREY[0])], [0, 1])
    for more in ({}, {"size": 6}):
        with pytest.raises(ValueError, match=r"row 1 is \(C, H, W\) = \(1, ") as error:
            read("parquet", tmp_path, **more)
        assert "data.size" not in str(error.value)  # which would not help


def test_a_label_below_0_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [encoded(GREY[0])] * 2, [0, -1])
    with pytest.raises(ValueError, match=r"labels must be 0, 1, 2, \.\.\.; found -1"):
        read("parquet", tmp_path, "test")


# --- folder -----------------------------------------------------------------------------------


def write_folder(root: Path, classes: dict[str, np.ndarray]) -> None:
    for name, pictures in classes.items():
        (root / name).mkdir(parents=True)
        for number, pixels in enumerate(pictures):
            (root / name / f"{number}.png").write_bytes(encoded(pixels))


@pytest.mark.parametrize("other", ["test", "val"])
def test_a_folder_has_one_folder_per_class_sorted(tmp_path: Path, other: str) -> None:
    write_folder(tmp_path / "train", {"wolf": COLOUR[:2], "ant": COLOUR[2:3], "bee": COLOUR[3:5]})
    write_folder(tmp_path / other, {"wolf": COLOUR[5:], "ant": COLOUR[5:], "bee": COLOUR[:1]})
    train, test = read("folder", tmp_path), read("folder", tmp_path, "test")
    assert train.label.tolist() == [0, 1, 1, 2, 2]
    np.testing.assert_array_equal(train.image, channels_first(COLOUR[[2, 3, 4, 0, 1]]))
    assert test.label.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(test.image, channels_first(COLOUR[[5, 0, 5]]))


def test_a_class_has_one_number_in_both_parts(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"ant": COLOUR[:1], "bee": COLOUR[:1], "wolf": COLOUR[:1]})
    write_folder(tmp_path / "test", {"ant": COLOUR[:1], "wolf": COLOUR[:1]})
    try:
        labels = read("folder", tmp_path, "test").label.tolist()
    except ValueError:
        return  # to refuse is right, too; to call a wolf a bee is not
    assert labels == [0, 2]


def test_a_missing_part_of_a_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"ant": COLOUR[:1]})
    with pytest.raises(ValueError, match="has no folder test or val with one folder per class"):
        read("folder", tmp_path, "test")


def test_a_part_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train"):
        read("folder", tmp_path)


def test_a_broken_file_in_a_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"ant": COLOUR[:2]})
    (tmp_path / "train" / "ant" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"ant/1\.png: a picture that cannot be decoded"):
        read("folder", tmp_path)


# --- torchvision ------------------------------------------------------------------------------


def write_idx(path: Path, values: np.ndarray) -> None:
    """The format of MNIST's files: two zeros, the type (8: uint8), dimensions, values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.mark.parametrize("name", ["FashionMNIST", "fashionmnist"])
def test_a_torchvision_dataset_is_read_from_a_local_root(tmp_path: Path, name: str) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    write_idx(raw / "train-images-idx3-ubyte", GREY[:4])
    write_idx(raw / "train-labels-idx1-ubyte", np.array(LABELS[:4]))
    write_idx(raw / "t10k-images-idx3-ubyte", GREY[4:])
    write_idx(raw / "t10k-labels-idx1-ubyte", np.array(LABELS[4:]))
    train, test = read(name, tmp_path), read(name, tmp_path, "test")
    np.testing.assert_array_equal(train.image, channels_first(GREY[:4]))
    np.testing.assert_array_equal(test.image, channels_first(GREY[4:]))
    assert (train.label.tolist(), test.label.tolist()) == (LABELS[:4], LABELS[4:])


def test_an_unknown_dataset_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown dataset 'SVNH'; did you mean 'SVHN'\?"):
        read("SVNH", tmp_path)
    with pytest.raises(ValueError, match=r"unknown dataset 'digit'; did you mean 'digits'\?"):
        read("digit", tmp_path)


@pytest.mark.parametrize("name", ["FashionMNIST", "CIFAR100", "SVHN"])
def test_missing_data_says_how_to_fetch_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"torchvision's {name} in .*data\.download=true"):
        read(name, tmp_path)


# --- all --------------------------------------------------------------------------------------


def test_a_limit_takes_the_first_training_rows_only() -> None:
    pictures = read("digits", limit=25)
    np.testing.assert_array_equal(pictures.image, read("digits").image[:25])
    np.testing.assert_array_equal(pictures.label, read("digits").label[:25])
    assert pictures.num_classes == 10
    assert len(read("digits", part="test", limit=25).label) == 359


def test_the_test_part_may_be_another_dataset_s_and_training_stays(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [encoded(picture) for picture in GREY], LABELS)
    here = DataConfig(name="parquet", root=tmp_path)
    there = DataConfig(name="parquet", root=tmp_path, test=OtherData(name="digits"))
    assert [has_test_part(data) for data in (here, there)] == [False, True]
    tested = read_pictures(there, "test")
    np.testing.assert_array_equal(tested.image, read("digits", part="test").image)
    np.testing.assert_array_equal(read_pictures(there, "train").image, channels_first(GREY))


def test_the_digest_changes_with_one_pixel_one_label_and_the_shape() -> None:
    image, label = channels_first(GREY), np.array(LABELS)
    brighter, other = image.copy(), label.copy()
    brighter[3, 0, 2, 2] ^= 1
    other[3] += 1
    made = [
        Pictures(image, label, 3),
        Pictures(brighter, label, 3),
        Pictures(image, other, 3),
        Pictures(image, label, 4),
        Pictures(image.transpose(0, 1, 3, 2), label, 3),
        Pictures(np.ascontiguousarray(image).reshape(6, 1, 7, 5), label, 3),
    ]
    assert len({pictures.digest for pictures in made}) == len(made)
    copy = Pictures(np.asfortranarray(image), label.copy(), 3)
    assert copy.digest == made[0].digest


@settings(deadline=None)
@given(count=st.integers(2, 500), share=st.floats(0.01, 0.5), seed=st.integers(0, 2**40))
def test_a_split_covers_every_row_once_in_order(count: int, share: float, seed: int) -> None:
    data = DataConfig(name="digits", validation=share, split_seed=seed)
    train, validation = split(count, data)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(count))
    assert train.tolist() == sorted(train.tolist())
    assert validation.tolist() == sorted(validation.tolist())
    assert len(validation) == max(1, round(count * share))


def test_a_split_depends_on_its_seed_only() -> None:
    data = DataConfig(name="digits", split_seed=3)
    same = DataConfig(name="parquet", split_seed=3, views=8, view_seed=5, limit=100, size=16)
    np.testing.assert_array_equal(split(200, data)[1], split(200, same)[1])
    other = DataConfig(name="digits", split_seed=4)
    assert set(split(200, data)[1].tolist()) != set(split(200, other)[1].tolist())


@pytest.mark.skipif(not (KD_DATA / "cifar10").is_dir(), reason="KD_DATA has no cifar10 folder")
def test_the_real_cifar10_is_read() -> None:
    test = read("parquet", KD_DATA / "cifar10", "test")
    assert test.image.shape == (10_000, 3, 32, 32)
    assert test.num_classes == 10
    assert np.bincount(test.label).tolist() == [1000] * 10
    # the channel means that every CIFAR-10 recipe normalises with, within the test part's error
    mean = test.image.mean(axis=(0, 2, 3)) / 255
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=0.01)
