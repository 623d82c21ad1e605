"""What the trials of a sweep share: data sets, teachers, and what is read of these."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipelines.config import RunConfig
from pipelines.digests import digest, plain
from pipelines.ranges import LISTED
from pipelines.runs import Run
from pipelines.space import VARIANT, SweepConfig, neighbours


@dataclass(frozen=True)
class Shared:
    """One data set and its teachers, as one of the trials has them."""

    run: Run
    # by teacher of a student: those that any of the trials reads
    layers: Mapping[str, frozenset[str]]


def inputs_key(run: Run) -> str:
    """Names the data set and the teachers of a run; runs of one key share their inputs."""
    content = plain(run)
    return digest([content["data"], content["teacher"]])


def shared(config: SweepConfig) -> dict[str, Shared]:
    """What has to be made ready before a sweep's trials, by ``inputs_key``.

    Raises ValueError for data or teachers that vary by anything but listed values.
    """
    near, found = neighbours(config), dict[str, Shared]()
    for run in _differing(config):
        key = inputs_key(run)
        if key not in found:
            found[key] = Shared(run, _layers(near, run))
    return found


def _layers(near: list[Run], run: Run) -> Mapping[str, frozenset[str]]:
    """Of the run's teachers the layers that its trials will read, whose losses differ."""
    layers: dict[str, frozenset[str]] = {}
    for other in near:
        if not isinstance(other, RunConfig):
            continue
        taught = other.model_copy(update={"teacher": run.teacher})
        for label, read in taught.teacher_layers.items():
            layers[label] = layers.get(label, frozenset()).union(read)
    return layers


def _differing(config: SweepConfig) -> Iterator[Run]:
    """A run for every data set and teacher that the sweep's trials can have."""
    for variant in config.variants or [None]:
        ranges = {
            path: values
            for path, values in config.ranges_of(variant).items()
            if path.split(".")[0] in ("data", "teacher")
        }
        for path, values in ranges.items():
            if values.kind not in LISTED:
                raise ValueError(
                    f"space.{path}: the data and the teacher vary by listed values only"
                )
        named = {VARIANT: variant} if variant else {}
        for listed in itertools.product(*(values.given for values in ranges.values())):
            yield config.run(named | dict(zip(ranges, listed, strict=True)))
