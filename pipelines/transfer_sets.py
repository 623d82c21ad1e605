"""The folder of a transfer set, as it tells whoever trains on its pictures what they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

# In the folder of a set: what it is of, and that every file is there.
MANIFEST, DONE = "manifest.json", "_SUCCESS"


@dataclass(frozen=True)
class Invented:
    """What a manifest says of the pictures of its set."""

    num_classes: int
    shape: tuple[int, int, int]  # channels, height, width

    @property
    def size(self) -> int | tuple[int, int]:
        """As `data.size` has it, where the pictures are square."""
        _, height, width = self.shape
        return height if height == width else (height, width)


def invented(root: Path | None) -> Invented | None:
    """What a folder's manifest says, finished or not; None for a folder of other data."""
    manifest = None if root is None else root / MANIFEST
    if manifest is None or not manifest.is_file():
        return None
    held = json.loads(manifest.read_text())
    if not {"teacher_digest", "num_classes", "shape"} <= held.keys():
        return None
    return Invented(held["num_classes"], tuple(held["shape"]))
