"""A cache on a full disk, in a folder that may not be written, and in a store of objects."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from pipelines.cache.inspection import damaged_files, inspected, prune
from pipelines.cache.manifest import DONE, is_complete
from pipelines.cache.storage import Store, store_at
from tests.pipelines.caches import (
    LAYERS,
    columns_for,
    files_of,
    read,
    store_of,
    toy,
    write,
    written_here,
)

NOBODY = 65534


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch, workdir: Path) -> None:
    monkeypatch.setattr("pipelines.cache.write.written", written_here)


# --- disks ------------------------------------------------------------------------------------


@contextmanager
def small_files() -> Iterator[None]:
    """The kernel refuses to let a file grow beyond 8 KiB: logits fit, maps do not.

    For the length of a write only: what pytest prints may go to a longer file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 2**10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full_disk() -> Iterator[Path]:
    """A real disk of 256 KiB."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("only root may mount")
        yield Path(folder)
        subprocess.run(["umount", folder], check=True)


def check_told_and_resumable(
    caches: str, number: int, disk: AbstractContextManager[None] | None = None
) -> None:
    run, message = toy(caches=caches), r"no space left for .*part-.*point `caches` else"
    with pytest.raises(OSError, match=message) as told, disk or nullcontext():
        write(run)
    assert told.value.errno == number
    root = Path(store_of(run).root)
    assert not list(root.glob("layers/block1/*/" + DONE))
    assert not list(root.glob("**/.part-*")), "what has half arrived was left"
    assert not is_complete(store_of(run), columns_for(run), 2)


def test_a_file_that_does_not_fit_is_said_in_one_line(tmp_path: Path) -> None:
    check_told_and_resumable(str(tmp_path / "caches"), errno.EFBIG, small_files())


def test_a_full_disk_is_said_in_one_line_and_the_rest_is_written_later(full_disk: Path) -> None:
    check_told_and_resumable(str(full_disk), errno.ENOSPC)
    (cache,) = full_disk.iterdir()
    before = files_of(cache)
    assert before
    subprocess.run(["mount", "-o", "remount,size=16m", str(full_disk)], check=True)
    run = toy(caches=str(full_disk))
    write(run)
    assert is_complete(store_of(run), columns_for(run), 2)
    after = files_of(cache)
    assert {name: after[name] for name in before} == before


def test_a_folder_that_may_not_be_written_is_said_in_one_line() -> None:
    folder = Path(tempfile.mkdtemp())  # one that others may enter, as tests' own folders are not
    folder.chmod(0o555)
    run, root = toy(caches=str(folder)), os.geteuid() == 0
    if root:  # whom no permission stops
        os.seteuid(NOBODY)
    try:
        with pytest.raises(OSError, match=r"may not be written; point `caches` elsewhere"):
            write(run)
    finally:
        if root:
            os.seteuid(0)
    assert list(folder.iterdir()) == []
    folder.rmdir()


# --- objects ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of moto's server, on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server.start()
        host, port = server.get_host_and_port()
        where = f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        store = store_at(f"s3://kdsweep{where}&allow_bucket_creation=true")
        store.files.create_dir("kdsweep")
        yield f"s3://kdsweep/caches{where}"
        server.stop()


def test_a_cache_of_objects_is_that_of_files(bucket: str) -> None:
    layers = (*LAYERS, "block2@gap+std")
    there, here = toy(caches=bucket), toy()
    remote = write(there, layers, rows_per_file=400)
    write(here, layers)
    assert str(remote).startswith("s3://kdsweep/caches/")
    one, other = read(there, layers), read(here, layers)
    rows = np.arange(400)
    for view in range(3):
        np.testing.assert_array_equal(one.logits[view][rows], other.logits[view][rows])
        for layer in (*layers, "embedding"):
            np.testing.assert_array_equal(
                one.features[layer][view][rows], other.features[layer][view][rows]
            )
    assert {column.folder: column.rows for column in inspected(remote).columns} == {
        column.folder: column.rows for column in inspected(store_of(here)).columns
    }
    assert damaged_files(remote) == []


def test_a_cache_of_objects_grows_and_is_cleaned_up(bucket: str) -> None:
    run = toy(caches=bucket, data__view_seed=3, data__views=1)
    store = write(run, rows_per_file=400)
    before = store.sizes()
    grown = toy(caches=bucket, data__view_seed=3, data__views=2)
    assert write(grown, rows_per_file=400) == store
    after = store.sizes()
    assert {name: after[name] for name in before} == before
    assert {name.split("view=")[1][:4] for name in after.keys() - before} == {"0002"}
    store.remove(f"logits/view=0002/{DONE}")
    assert prune(store) == [f"{store}/logits/view=0002"]
    assert is_complete(store, columns_for(run), 1)
    assert not is_complete(store, columns_for(run), 2)


def test_an_object_that_is_not_written_to_its_end_is_not_there(bucket: str) -> None:
    store = store_at(bucket)
    stream = store.files.open_output_stream(f"{store.root}/half")
    stream.write(b"0" * 2**20)
    assert not store.has("half")
    stream.close()
    assert store.has("half")


@pytest.mark.parametrize("place", ["caches", "/tmp/caches", "file:///tmp/caches"])
def test_a_place_on_this_machine_is_a_folder(place: str) -> None:
    store: Store = store_at(place)
    assert store.root == str(Path(place.removeprefix("file://")).absolute())
    assert str(store) == store.root
