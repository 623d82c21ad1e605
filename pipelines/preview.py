"""What a sweep (a run is one over nothing) would do: checked, and told in words or as a plan."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.build import build_student, checked
from pipelines.config import RunConfig
from pipelines.generative import plan as generative
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.jobs import checked as checked_generative
from pipelines.generative.models import build_model
from pipelines.plan import Plan, planned
from pipelines.sources import Pictures
from pipelines.space import SweepConfig, neighbours


def described(config: SweepConfig) -> list[str]:
    """Lines about data, networks, losses and space.

    Raises ValueError where a run of the sweep does not fit its data, networks or losses.
    """
    base = config.base
    lines = _of_model(base, config) if isinstance(base, GenerativeConfig) else _of_run(base, config)
    return [*lines, *_of_space(config)]


def plan_of(config: SweepConfig) -> Plan:
    """The trials and what they would cost; raises as ``described`` does."""
    if isinstance(config.base, GenerativeConfig):
        return generative.planned(config)
    return planned(config, _checked(config))


def _checked(config: SweepConfig) -> Pictures:
    pictures = checked(config.base)
    for neighbour in neighbours(config):
        checked(neighbour)
    return pictures


def _of_run(run: RunConfig, config: SweepConfig) -> Iterator[str]:
    pictures = _checked(config)
    shape = "x".join(map(str, pictures.image.shape[1:]))
    yield f"{len(pictures.label)} pictures {shape}, {pictures.num_classes} classes"
    yield from (f"  skipped {place}" for place in pictures.skipped)
    count = sum(parameter.numel() for parameter in build_student(run, pictures).parameters())
    yield f"student {run.student.name}: {count:,} parameters"
    for label, term in run.losses.items():
        whose = f"from {run.called(term.teacher)}" if term.teacher else ""
        compared = f"{term.loss} {term.params} {term.layers or ''} {whose}"
        yield f"  {label}: {term.weight} x {compared}".rstrip()
    if run.synthetic is not None:
        count = run.synthetic.batches_per_epoch
        yield f"synthetic: {run.synthetic.method}, {count} batches of {run.batch_size} an epoch"


def _of_model(run: GenerativeConfig, config: SweepConfig) -> Iterator[str]:
    for one in [run, *neighbours(config)]:
        checked_generative(one)
    generator = build_model(run.model).generator
    count = sum(parameter.numel() for parameter in generator.parameters())
    yield f"{run.mode}: {run.model.name}, {count:,} parameters to generate with"


def _of_space(config: SweepConfig) -> Iterator[str]:
    yield from (f"  variant {variant}" for variant in config.variants)
    for path, values in config.space.items():
        yield f"  over {path}: {values.kind} {values.given}"
