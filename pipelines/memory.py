"""Whether rows fit into memory, said before they are read."""

from __future__ import annotations

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # version 2: a container's limit, and what of it is in use


def check_fits(num_bytes: int, what: str) -> None:
    """Raise ValueError unless there is memory for so much."""
    available = available_bytes()
    if num_bytes > available:
        raise ValueError(
            f"{what} would take {num_bytes / 2**30:.2f} GiB of memory, and {available / 2**30:.2f} "
            "GiB are left; set `data.spool` to a folder of a fast disk, to read rows from there"
        )


def available_bytes() -> int:
    """What may still be taken, of the machine's memory and of the container's."""
    limit = CGROUP / "memory.max"
    if not limit.exists() or limit.read_text().strip() == "max":
        return _of_machine()
    # files that were read lately count as in use, and make way for what is needed
    files = _numbers(CGROUP / "memory.stat")["inactive_file"]
    used = int((CGROUP / "memory.current").read_text()) - files
    return min(_of_machine(), int(limit.read_text()) - used)


def _of_machine() -> int:
    if not MEMINFO.exists():  # not Linux: all that there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 1024 * _numbers(MEMINFO)["MemAvailable:"]


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}
