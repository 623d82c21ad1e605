"""A folder on any file system that pyarrow knows: this machine's, ``s3://`` or ``gs://``."""

from __future__ import annotations

import errno
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
from filelock import FileLock, Timeout
from pyarrow import fs

WAIT_S = 1.0  # between two looks at a lock that somebody else has


@dataclass(frozen=True)
class Store:
    """A folder whose files appear whole or not at all, whoever is killed while writing them."""

    files: fs.FileSystem
    root: str

    def __truediv__(self, name: str) -> Store:
        return replace(self, root=f"{self.root}/{name}")

    def __str__(self) -> str:
        scheme = "" if self._is_local else f"{self.files.type_name}://"
        return scheme + self.root

    @property
    def name(self) -> str:
        return self.root.rpartition("/")[2]

    @property
    def parent(self) -> Store:
        return replace(self, root=self.root.rpartition("/")[0])

    def has(self, name: str) -> bool:
        found = self.files.get_file_info(f"{self.root}/{name}")
        return bool(found.type == fs.FileType.File)

    def read(self, name: str) -> pa.Buffer:
        with self.files.open_input_file(f"{self.root}/{name}") as file:
            return file.read_buffer()

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Put a whole file in place of what may be there.

        Raises OSError with the remedy where there is no space, or nothing may be written.
        """
        path = f"{self.root}/{name}"
        folder, _, file = path.rpartition("/")
        # an object store shows an object when all of it has arrived; a folder shows what is there
        arriving = f"{folder}/.{file}.{uuid.uuid4().hex}" if self._is_local else path
        with self._explained(path, len(memoryview(content))):
            if self._is_local:
                self.files.create_dir(folder, recursive=True)
            try:
                with self.files.open_output_stream(arriving) as stream:
                    stream.write(content)
                if arriving != path:
                    self.files.move(arriving, path)
            except OSError:
                self._forget(arriving)
                raise

    def remove(self, name: str = "") -> None:
        """Remove a file, or a folder with all that is in it; of an object store, too."""
        path = f"{self.root}/{name}".rstrip("/")
        if self.files.get_file_info(path).type == fs.FileType.Directory:
            self.files.delete_dir(path)
        else:
            self.files.delete_file(path)

    def listed(self, *, folders: bool = False) -> list[str]:
        """Names of the files (or of the folders) directly in here, sorted; hidden ones too."""
        kind = fs.FileType.Directory if folders else fs.FileType.File
        selector = fs.FileSelector(self.root, allow_not_found=True)
        return sorted(
            found.base_name for found in self.files.get_file_info(selector) if found.type == kind
        )

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below here, by its path from here."""
        selector = fs.FileSelector(self.root, recursive=True, allow_not_found=True)
        return {
            found.path.removeprefix(self.root).lstrip("/"): found.size
            for found in self.files.get_file_info(selector)
            if found.type == fs.FileType.File
        }

    @contextmanager
    def alone(self, waiting: Callable[[], None]) -> Iterator[None]:
        """For one process of this machine at a time; ``waiting`` is called while another is in.

        The lock goes with the process, however it ends. Processes of other machines that write the
        same object store do the same work twice, and the same files.
        """
        if self._is_local:
            with self._explained(self.root, 0):
                self.files.create_dir(self.root, recursive=True)
                lock = FileLock(Path(self.root) / ".lock")
                _acquire(lock, waiting)
        else:
            name = sha256(str(self).encode()).hexdigest()[:16]
            lock = FileLock(Path(tempfile.gettempdir()) / f"kdsweep-{name}.lock")
            _acquire(lock, waiting)
        try:
            yield
        finally:
            lock.release()

    @property
    def _is_local(self) -> bool:
        return isinstance(self.files, fs.LocalFileSystem)

    @contextmanager
    def _explained(self, path: str, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            number = error.errno or 0
            if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(
                    number,
                    f"no space left for {path} ({size} bytes); what is written stays: free some "
                    "and call the same command again, or point `caches` elsewhere",
                ) from error
            if number in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise OSError(
                    number, f"{path} may not be written; point `caches` elsewhere"
                ) from error
            raise

    def _forget(self, path: str) -> None:
        """Remove what has half arrived; what cannot be removed does no harm."""
        try:
            self.files.delete_file(path)
        except OSError:
            return


def store_at(place: str) -> Store:
    """The folder that a path or a URI names: ``caches``, ``s3://bucket/caches``, ``gs://...``.

    A URI may carry options, as ``s3://bucket/caches?endpoint_override=localhost:9000&scheme=http``.
    """
    if "://" not in place:
        return Store(fs.LocalFileSystem(), str(Path(place).absolute()))
    files, root = fs.FileSystem.from_uri(place)
    return Store(files, root.rstrip("/"))


def _acquire(lock: FileLock, waiting: Callable[[], None]) -> None:
    while True:
        try:
            lock.acquire(timeout=WAIT_S)
        except Timeout:
            waiting()
        else:
            return
