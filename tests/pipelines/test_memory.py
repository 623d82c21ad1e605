"""What memory is left, of a machine and of a container."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pipelines import memory


def test_what_is_left_is_some_of_what_there_is() -> None:
    assert 0 < memory.available_bytes() < psutil.virtual_memory().total


@pytest.mark.parametrize(("limit", "left"), [("5000", 5000 - (3000 - 1000)), ("max", None)])
def test_a_container_has_less_than_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, left: int | None
) -> None:
    files = {
        "memory.max": limit,
        "memory.current": "3000",
        "memory.stat": "anon 7\ninactive_file 1000",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n")
    (tmp_path / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable: 40 kB\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.available_bytes() == (40 * 1024 if left is None else left)
    with pytest.raises(ValueError, match="rows would take"):
        memory.check_fits(memory.available_bytes() + 1, "rows")
    memory.check_fits(memory.available_bytes(), "rows")
