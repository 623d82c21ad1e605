"""Pictures per second and core of every operation of a view, and of what a reader does with them.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/views.py [ROUNDS]. One thread, process time, noise
of CIFAR's size (3x32x32, uint8), 50,000 of them in random order; the best of the rounds, since
what else the machine does only adds. "From rows" gathers the rows, shows and normalises them: what
the in-memory reader does but for the teacher's outputs. Issue 6 asks 40,000 of it with crop and
flip, better 60,000.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from pipelines.data import seen_as
from pipelines.datasets import DataConfig
from pipelines.strict import validated
from pipelines.views import checksums, normalised, view

PICTURES, BATCHES = 50_000, (64, 256)
ASKED = 40_000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPERATIONS: Mapping[str, Mapping[str, Any]] = {
    "crop": {"crop": 4},
    "flip": {"flip": True},
    "crop, flip": {"crop": 4, "flip": True},
    "resized_crop": {"resized_crop": {}},
    "jitter": {"jitter": {}},
    "jitter with hue": {"jitter": {"hue": 0.1}},
    "randaugment, 2 of 14": {"randaugment": {}},
    "erase, noise": {"erase": {}},
    "erase, grey": {"erase": {"fill": 127}},
    "mixup": {"mixup": {}},
    "cutmix": {"cutmix": {}},
}


def per_second(work: Callable[[], object], rows: int, rounds: int) -> float:
    work()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return rows / min(times)


def data_of(augment: Mapping[str, Any]) -> DataConfig:
    content = {"name": "noise", "views": 1, "augment": augment}
    return validated(DataConfig, content, where="benchmark")


def rates(batch: int, rounds: int) -> dict[str, float]:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (PICTURES, 3, 32, 32), dtype=np.uint8)
    label = generator.integers(0, 10, PICTURES)
    rows = generator.permutation(PICTURES)[:batch]
    some = torch.from_numpy(image[rows])

    def fetched(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return image[rows], label[rows]

    def seen(data: DataConfig) -> torch.Tensor:
        return seen_as(data, fetched, rows, 1, count=PICTURES).image

    def shown(augment: Mapping[str, Any]) -> Callable[[], object]:
        data = data_of(augment)
        if data.augment.mixes:  # with its partner, both from rows
            return lambda: seen(data)
        return lambda: view(some, torch.from_numpy(rows), 1, augment=data.augment, seed=0)

    measured = {name: per_second(shown(on), batch, rounds) for name, on in OPERATIONS.items()}
    both = data_of(OPERATIONS["crop, flip"])
    measured["normalised"] = per_second(lambda: normalised(some, mean=MEAN, std=STD), batch, rounds)
    measured["checksums"] = per_second(lambda: checksums(some), batch, rounds)
    measured["from rows: crop, flip, normalised"] = per_second(
        lambda: normalised(seen(both), mean=MEAN, std=STD), batch, rounds
    )
    return measured


def main(rounds: int = 50) -> None:
    torch.set_num_threads(1)
    tables = [rates(batch, rounds) for batch in BATCHES]
    print("| operation | " + " | ".join(f"batches of {batch}" for batch in BATCHES) + " |")
    print("|---|" + "---:|" * len(BATCHES))
    for name in tables[0]:
        print(f"| {name} | " + " | ".join(f"{table[name]:,.0f}" for table in tables) + " |")
    least = min(table["from rows: crop, flip, normalised"] for table in tables)
    print(f"\ncrop, flip, normalised: {least:,.0f} pictures/s per core, asked {ASKED:,}")


if __name__ == "__main__":
    main(*[int(argument) for argument in sys.argv[1:]])
