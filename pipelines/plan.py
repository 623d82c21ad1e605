"""What a sweep would do: its trials, the cache they share, and how long it would take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcore.types import Batch, Outputs
from pipelines.build import build_step, probe_of
from pipelines.config import RunConfig
from pipelines.data import Reader
from pipelines.sources import Pictures
from pipelines.space import SweepConfig, points
from pipelines.train import finished

_STEPS_TIMED = 3
_CACHED_BYTES = 2  # of a number in float16


@dataclass(frozen=True)
class Plan:
    """The trials as points of the space, none where the search proposes them one by one."""

    trials: list[dict[str, Any]]
    count: int
    finished: int  # of the listed ones
    cache_rows: int
    cache_bytes: int  # before compression, of all cached teachers of the base
    step_seconds: float  # of the base, training only, in one process
    hours: float  # of training that is left, one trial after the other


def planned(config: SweepConfig, pictures: Pictures) -> Plan:
    """The plan of a sweep whose base has been checked against these pictures."""
    base, (listed, count, done) = config.base, counted(config)
    reader = Reader(base, pictures)
    seconds = _step_seconds(base, pictures, reader)
    steps = base.epochs * reader.batches_per_epoch
    rows = len(pictures.label) + base.data.views * len(reader.train_rows)
    return Plan(
        trials=listed,
        count=count,
        finished=done,
        cache_rows=rows,
        cache_bytes=rows * _bytes_per_row(base, pictures),
        step_seconds=seconds,
        hours=(count - done) * steps * seconds / 3600,
    )


def counted(config: SweepConfig) -> tuple[list[dict[str, Any]], int, int]:
    """The listed trials, how many there will be, and how many of the listed ones are finished."""
    listed = [] if config.search.algorithm == "optuna" else points(config)
    count = len(listed) or config.search.num_samples * config.seeds
    return listed, count, sum(finished(config.run(point)) is not None for point in listed)


def _bytes_per_row(run: RunConfig, pictures: Pictures) -> int:
    """Of all teachers that are heard from a cache."""
    said = probe_of(run, pictures).batch.teachers
    cached = [said[label] for label, held in run.heard.items() if held.source == "cached"]
    numbers = sum(
        held[0].numel() for outputs in cached for held in (outputs.logits, *_features(outputs))
    )
    return _CACHED_BYTES * numbers


def _features(outputs: Outputs) -> list[Tensor]:
    return list(outputs.features.values())


def _step_seconds(run: RunConfig, pictures: Pictures, reader: Reader) -> float:
    """Wall time of one training step on this process's device, loading the batch included.

    Teachers are stood in for by what blank networks say of blank pictures, so that the forward pass
    of a live one is not in it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = build_step(run, pictures).to(device).train()
    probe = probe_of(run, pictures).batch
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-12)
    batches, spent = reader.train(0), []
    for _ in range(min(_STEPS_TIMED, reader.batches_per_epoch)):
        started = time.perf_counter()
        batch = next(batches)
        step(_taught(batch, probe).to(device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spent.append(time.perf_counter() - started)
    return min(spent)


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
