"""What a sweep over graphical models would do, and how long it would take."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import islice

from pipelines.generative.batches import Batches
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.inputs import evidence_of, step_of
from pipelines.generative.jobs import checked
from pipelines.loop import pick_device
from pipelines.plan import Plan, counted
from pipelines.space import SweepConfig, neighbours

_STEPS_TIMED = 3


def planned(config: SweepConfig) -> Plan:
    """The plan of a sweep, once every run of it has been checked; nothing is cached."""
    for run in neighbours(config):
        checked(run)
    listed, count, done = counted(config)
    seconds, steps = _step_seconds(config.base)
    plan = Plan(listed, count, done, 0, 0, seconds, hours=0.0)
    return replace(plan, hours=(count - done) * config.base.epochs * steps * seconds / 3600)


def _step_seconds(run: GenerativeConfig) -> tuple[float, int]:
    """Wall time of one training step, of a teacher without its weights; and steps of an epoch."""
    device = pick_device()
    step, _ = step_of(run, None, blank=True)
    seen = evidence_of(run) if run.learns_from_data else None
    batches, spent = Batches(run, seen, 0, device), []
    step.to(device).train()
    started = time.perf_counter()
    for batch in islice(batches.train(0), _STEPS_TIMED):
        step(batch).loss.backward()
        spent.append(time.perf_counter() - started)
        started = time.perf_counter()
    return min(spent), batches.per_epoch
