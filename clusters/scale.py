"""What ImageNet-1k and sweeps of 1,000 trials need, by arithmetic: python clusters/scale.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.cache.parts import ROWS_PER_FILE

FLOAT16_BYTES = 2
# a call of MLflow's server while six processes wrote, on two cores, with SQLite behind it: fewer
# writers wait less
SECONDS_PER_WRITE = 0.1


@dataclass(frozen=True)
class Cache:
    """A teacher's outputs: view 0 of every picture, the others of those that are trained on."""

    pictures: int
    views: int
    classes: int
    embedding: int
    validation: float = 0.1

    @property
    def rows(self) -> int:
        return sum(self._rows_of_views)

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.classes * FLOAT16_BYTES

    @property
    def embedding_bytes(self) -> int:
        return self.rows * self.embedding * FLOAT16_BYTES

    @property
    def files(self) -> int:
        """Of both columns; a file has rows of one view."""
        return 2 * sum(math.ceil(rows / ROWS_PER_FILE) for rows in self._rows_of_views)

    @property
    def _rows_of_views(self) -> list[int]:
        train = round(self.pictures * (1 - self.validation))
        return [self.pictures, *[train] * self.views]


@dataclass(frozen=True)
class Sweep:
    """Its writes to MLflow: an epoch is one, a trial's beginning three and its end one."""

    trials: int
    epochs: int
    at_once: int
    epoch_seconds: float

    @property
    def writes(self) -> int:
        return self.trials * (self.epochs + 4)

    @property
    def writes_per_second(self) -> float:
        duration_s = self.trials * self.epochs * self.epoch_seconds / self.at_once
        return self.writes / duration_s

    @property
    def most_at_once(self) -> int:
        """Trials side by side at which a driver that writes one at a time falls behind."""
        return math.floor(self.epoch_seconds / SECONDS_PER_WRITE)


IMAGENET = Cache(pictures=1_281_167, views=16, classes=1000, embedding=2048)
PIXELS = 3 * 224 * 224
SWEEPS = {
    "small pictures, 240 epochs of 10 s, 32 at once": Sweep(1000, 240, 32, 10),
    "ImageNet, 100 epochs of 600 s, 64 at once": Sweep(1000, 100, 64, 600),
    "no-op trials, 1 epoch of 0.5 s, 8 at once": Sweep(1000, 1, 8, 0.5),
}


def table() -> Iterator[str]:
    """The numbers as Markdown."""
    gigabytes = 1e9
    yield "| ImageNet-1k, 16 views, 2048-d | |"
    yield "|---|---|"
    yield f"| rows of the cache | {IMAGENET.rows:,} |"
    yield f"| logits, float16 | {IMAGENET.logits_bytes / gigabytes:.0f} GB |"
    yield f"| embeddings, float16 | {IMAGENET.embedding_bytes / gigabytes:.0f} GB |"
    yield f"| Parquet files of {ROWS_PER_FILE:,} rows | {IMAGENET.files:,} |"
    yield f"| pictures as 224 x 224 pixels | {IMAGENET.pictures * PIXELS / gigabytes:.0f} GB |"
    held = IMAGENET.logits_bytes + IMAGENET.embedding_bytes + IMAGENET.pictures * PIXELS
    yield f"| object store of each node without `data.spool` | {held / gigabytes:.0f} GB |"
    yield ""
    yield "| 1,000 trials | writes to MLflow | a second | trials that one driver can follow |"
    yield "|---|---|---|---|"
    for name, sweep in SWEEPS.items():
        counts = f"{sweep.writes:,} | {sweep.writes_per_second:.1f} | {sweep.most_at_once:,}"
        yield f"| {name} | {counts} |"


if __name__ == "__main__":
    print("\n".join(table()))
