"""How many workers a run has, and how they share its batches."""

from __future__ import annotations

import math


def check_shares(batch_size: int, workers: int, min_workers: int | None) -> None:
    """Raise ValueError where a number of workers that the run may have cannot share its batches.

    Every worker gets as many rows as every other: DDP takes the mean of their gradients.
    """
    fewest = workers if min_workers is None else min_workers
    if fewest > workers:
        raise ValueError(f"min_workers {fewest} is more than workers {workers}")
    for count in range(fewest, workers + 1):
        if batch_size % count:
            wanted = math.lcm(*range(fewest, workers + 1))
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of workers {count}: every worker gets "
                f"as many rows as every other; take a multiple of {wanted}"
            )
