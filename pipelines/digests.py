"""Configurations and files as short digests: equal where the contents are."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.strict import Strict


def plain(config: Strict) -> dict[str, Any]:
    """The configuration as YAML would hold it, with every default filled in."""
    return config.model_dump(mode="json")


def digest(content: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path | None) -> str | None:
    """Of the content: other weights under the same name make another run."""
    if path is None or not path.is_file():
        return None if path is None else str(path)
    found = path.stat()
    return _digest_of(path, found.st_mtime_ns, found.st_size)


@lru_cache
def _digest_of(path: Path, changed_at: int, size: int) -> str:
    """Of the content, read once as long as the file stays as it is."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
