"""What a sweep would do: its trials, the cache they share, and how long it would take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcore.teachers import teacher_outputs
from kdcore.types import Batch, Outputs
from pipelines.build import build_step, build_teacher, probe_of
from pipelines.cache.columns import columns_of
from pipelines.config import RunConfig
from pipelines.data import Reader
from pipelines.sharing import Shared, shared
from pipelines.sources import Pictures, read_pictures, split
from pipelines.space import SweepConfig, points
from pipelines.train import finished

_STEPS_TIMED = 3
_ROWS_PROBED = 64  # to learn how many bytes a row has


@dataclass(frozen=True)
class Plan:
    """The trials as points of the space, none where the search proposes them one by one."""

    trials: list[dict[str, Any]]
    count: int
    finished: int  # of the listed ones
    cache_rows: int  # of all teachers that are heard from caches, whether written or not
    cache_bytes: int  # before compression
    step_seconds: float  # of the base, training only, in one process
    hours: float  # of training that is left, one trial after the other


def planned(config: SweepConfig, pictures: Pictures) -> Plan:
    """The plan of a sweep whose base has been checked against these pictures."""
    base, (listed, count, done) = config.base, counted(config)
    reader = Reader(base, pictures)
    seconds = step_seconds(base, pictures, reader)
    synthetic = base.synthetic
    per_epoch = synthetic.batches_per_epoch if synthetic else reader.batches_per_epoch
    steps = base.epochs * per_epoch
    caches = [cache for one in shared(config).values() for cache in _caches(one)]
    return Plan(
        trials=listed,
        count=count,
        finished=done,
        cache_rows=sum(rows for rows, _ in caches),
        cache_bytes=sum(rows * width for rows, width in caches),
        step_seconds=seconds,
        hours=(count - done) * steps * seconds / 3600,
    )


def counted(config: SweepConfig) -> tuple[list[dict[str, Any]], int, int]:
    """The listed trials, how many there will be, and how many of the listed ones are finished."""
    listed = [] if config.search.algorithm == "optuna" else points(config)
    count = len(listed) or config.search.num_samples * config.seeds
    return listed, count, sum(finished(config.run(point)) is not None for point in listed)


def _caches(one: Shared) -> Iterator[tuple[int, int]]:
    """Rows, and bytes of a row, of the cache of each teacher that the trials hear."""
    run = one.run
    pictures = read_pictures(run.data, "train")
    train_rows, _ = split(len(pictures.label), run.data)
    rows = len(pictures.label) + run.data.views * len(train_rows)
    for label, layers in one.layers.items():
        if run.teachers[label].source == "cached":
            yield rows, _bytes_per_row(run, label, layers, pictures)


def _bytes_per_row(run: RunConfig, label: str, layers: Iterable[str], pictures: Pictures) -> int:
    held = run.teachers[label].model_copy(update={"weights": None})  # which decide no size
    teacher = build_teacher(held, pictures, layers)
    image = torch.zeros(_ROWS_PROBED, *pictures.image.shape[1:])
    said, labels = teacher_outputs(teacher, image), np.zeros(_ROWS_PROBED, np.int64)
    columns = [one.encoded(said, labels) for one in columns_of(held.logits, teacher)]
    return sum(array.nbytes for arrays in columns for array in arrays.values()) // _ROWS_PROBED


def step_seconds(
    run: RunConfig,
    pictures: Pictures,
    reader: Reader,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Wall time of one training step on this process's device, loading the batch included.

    Teachers are stood in for by what blank networks say of blank pictures, and synthetic pictures
    by blank ones: neither a live teacher's forward pass is in it nor the making of pictures.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = build_step(run, pictures).to(device).train()
    probe = probe_of(run, pictures).batch
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-12)
    batches = reader.train(0) if run.synthetic is None else itertools.repeat(_blank(run, probe))
    count = _STEPS_TIMED if run.synthetic else min(_STEPS_TIMED, reader.batches_per_epoch)
    spent = []
    for _ in range(count):
        started = clock()
        batch = next(batches)
        step(_taught(batch, probe).to(device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spent.append(clock() - started)
    return min(spent)


def _blank(run: RunConfig, probe: Batch) -> Batch:
    rows = torch.arange(run.batch_size)
    return Batch(_grown(probe.image, run.batch_size), torch.zeros_like(rows), rows)


def _taught(batch: Batch, probe: Batch) -> Batch:
    count = len(batch.label)

    def grown(said: Outputs | None) -> Outputs | None:
        if said is None:
            return None
        features = {layer: _grown(held, count) for layer, held in said.features.items()}
        return Outputs(_grown(said.logits, count), features, said.classifier)

    teachers: Mapping[str, Any] = {label: grown(said) for label, said in probe.teachers.items()}
    return replace(batch, teacher=grown(probe.teacher), teachers=teachers)


def _grown(rows: Tensor, count: int) -> Tensor:
    """As many rows as a batch has, again and again the same, apart by a little noise."""
    repeated = rows[torch.arange(count) % len(rows)]
    return repeated + 1e-3 * torch.randn_like(repeated)
