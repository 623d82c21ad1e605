"""What ``kd cache`` does: write the caches of a run or a sweep, or look after those there are."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines import jobs
from pipelines.build import checked
from pipelines.cache.inspection import caches_in, inspected, prune
from pipelines.cache.storage import store_at
from pipelines.cluster import cluster
from pipelines.console import Bars, print_cache, say
from pipelines.generative import jobs as generative
from pipelines.generative.config import GenerativeConfig
from pipelines.runs import Run
from pipelines.sharing import shared
from pipelines.space import SweepConfig, neighbours
from pipelines.sweep import shared_inputs
from pipelines.tracking import Tracker


def write_caches(config: SweepConfig, *, verbose: bool) -> None:
    """What the cached teachers of all runs say. Raises ValueError where there is none."""
    if isinstance(config.base, GenerativeConfig):
        _write_traces(config, verbose=verbose)
    else:
        _write_outputs(config, verbose=verbose)


def _write_traces(config: SweepConfig, *, verbose: bool) -> None:
    runs = [one.run for one in shared(config).values()]
    heard = [run for run in runs if isinstance(run, GenerativeConfig) and run.hears_cache]
    if not heard:
        raise ValueError("no teacher has `source: cached`: nothing to cache")
    with Bars() as watch:
        held = [
            generative.prepared(run, watch=watch, tracker=Tracker(), verbose=verbose)
            for run in heard
        ]
    for inputs in held:
        say(f"cache {inputs.fingerprint}: {len(inputs.traces or ())} runs of the teacher")


def _write_outputs(config: SweepConfig, *, verbose: bool) -> None:
    runs = neighbours(config)
    if not any(teacher.source == "cached" for run in runs for teacher in run.heard.values()):
        raise ValueError("no loss listens to a cached teacher: nothing to cache")
    for run in runs:
        checked(run)
    with cluster(verbose=verbose), Bars() as watch:
        inputs = shared_inputs(config, watch=watch, tracker=Tracker())
    for held in inputs.values():
        for label, teacher in held.teachers.items():
            if teacher.accuracy is not None:
                accuracy = f"{config.base.called(label)} {teacher.accuracy:.2%}"
                say(f"cache {teacher.fingerprint}: {accuracy} on the validation split")


def show_caches(run: Run) -> None:
    """Of each cache where the run keeps them: views, layers, bytes."""
    for store in caches_in(store_at(run.caches)):
        print_cache(store.name, inspected(store))


def prune_caches(run: Run) -> None:
    """Remove what was begun and not finished."""
    removed = [name for store in caches_in(store_at(run.caches)) for name in prune(store)]
    for name in removed or ["nothing: every view is finished"]:
        say(f"removed {name}")


def verify_caches(run: Run) -> list[str]:
    """Look for faults of the run's caches, tell each of them, and return them."""
    found = cache_faults(run)
    faults = [fault for label in found for fault in found[label]]
    for fault in faults:
        say(fault, style="red")
    if not faults:
        say(f"{len(found)} caches are as they were written, and as their teachers say")
    return faults


def cache_faults(run: Run) -> Mapping[str, list[str]]:
    """What is wrong with the caches of a run of any kind, by teacher; nothing where one is sound.

    Raises ValueError for a cache that is not written yet.
    """
    with Bars() as watch:
        if isinstance(run, GenerativeConfig):
            return generative.cache_faults(run, watch=watch, tracker=Tracker())
        return jobs.cache_faults(run, watch=watch, tracker=Tracker())
