"""A run of a graphical model from nothing to a finished folder: its teacher first, then itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipelines.generative.batches import Batches, judge_of
from pipelines.generative.cache import TraceCache
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.figures import sample_figure
from pipelines.generative.inputs import GenerativeInputs, evidence_of, step_of
from pipelines.generative.models import Model, load_model
from pipelines.generative.observations import Observations
from pipelines.generative.samples import TRAINED, conditions, noise_of
from pipelines.generative.steps import DistilledStep, RowBatch
from pipelines.generative.tables import TableConfig
from pipelines.jobs import Watch, follower, start_tracking, trained
from pipelines.loop import Metrics, pick_device
from pipelines.tracking import Tracker
from pipelines.train import Finished, finished

SAMPLES, DISTANCES = "samples.png", "distances.json"
_PROBED = 4  # rows: BatchNorm wants more than one


def train(
    run: GenerativeConfig, *, watch: Watch, tracker: Tracker, verbose: bool = False
) -> Finished:
    """The run's model, trained, or found trained; tracked with its numbers and its samples."""
    done = finished(run)
    if done is not None:
        watch(run.name, run.epochs, run.epochs, f"found finished in {done.folder}")
        return done
    inputs = prepared(run, watch=watch, tracker=tracker, verbose=verbose)
    with start_tracking(run, inputs, tracker) as tracked:
        result = trained(run, inputs, follower(run, tracked, watch), verbose=verbose)
        for path in (result.weights, *described(run, result, inputs, result.folder)):
            tracked.log_artifact(path)
    return result


def prepared(
    run: GenerativeConfig, *, watch: Watch, tracker: Tracker, verbose: bool = False
) -> GenerativeInputs:
    """What the run trains on, its teacher trained where it is not yet."""
    weights = teacher_weights(run, watch=watch, tracker=tracker, verbose=verbose)
    checked(run, weights)
    inputs = GenerativeInputs(weights)
    if run.hears_cache:
        cache = cache_of(run, weights)
        traces = cache.traces(partial(watch, "cache"))
        inputs = replace(inputs, fingerprint=cache.fingerprint, traces=traces)
    seen = evidence_of(run)
    if seen is None or run.evidence is None:
        return inputs
    data = run.evidence
    name = data.table if isinstance(data, TableConfig) else data.name
    source = name if isinstance(data, TableConfig) else str(data.root or name)
    return replace(inputs, data=(name, seen.digest, source))


def cache_of(run: GenerativeConfig, weights: Path | None) -> TraceCache:
    """The cache of the runs of the run's teacher, which is trained."""
    assert run.teacher is not None
    assert weights is not None
    return TraceCache(run, load_model(run.teacher.network, weights))


def cache_faults(
    run: GenerativeConfig, *, watch: Watch, tracker: Tracker
) -> Mapping[str, list[str]]:
    """What is wrong with the cache of the run's teacher: nothing, if it is sound.

    Raises ValueError for a cache that is not written yet.
    """
    if not run.hears_cache:
        return {}
    weights = teacher_weights(run, watch=watch, tracker=tracker)
    return {"teacher": cache_of(run, weights).faults()}


def teacher_weights(
    run: GenerativeConfig, *, watch: Watch, tracker: Tracker, verbose: bool = False
) -> Path | None:
    """The weights of the run's teacher, trained first where it is another run's student."""
    if run.teacher is None:
        return None
    weights = run.teacher.weights
    if run.teacher.run is not None:
        weights = train(run.teacher.run, watch=watch, tracker=tracker, verbose=verbose).weights
    return weights and weights.absolute()  # a trial works in a folder of Ray's


def checked(run: GenerativeConfig, weights: Path | None = None) -> Observations | None:
    """The run's data, once it has been seen to fit the models, and these each other.

    Without ``weights`` nothing of the teacher is read. Raises ValueError for what does not fit.
    """
    step, _ = step_of(run, weights, blank=weights is None)
    seen = evidence_of(run) if run.learns_from_data or weights is not None else None
    if seen is not None and run.learns_from_data:
        Batches(run, seen, 0, torch.device("cpu")).check()
    if isinstance(step, DistilledStep):
        rows = torch.arange(_PROBED)
        noise = noise_of(run, rows, use=TRAINED)
        with torch.no_grad():
            step.train()(RowBatch(noise, {}, conditions(run.model, rows)))
    return seen


def models_of(
    run: GenerativeConfig, result: Finished, inputs: GenerativeInputs
) -> tuple[Model, Model | None]:
    """The run's best model and its teacher."""
    teacher = None
    if run.teacher is not None and inputs.weights is not None:
        teacher = load_model(run.teacher.network, inputs.weights)
    return load_model(run.model, result.weights), teacher


def described(
    run: GenerativeConfig, result: Finished, inputs: GenerativeInputs, folder: Path
) -> list[Path]:
    """Samples next to the teacher's as a picture, and the distances as a table."""
    model, teacher = models_of(run, result, inputs)
    figure = sample_figure(run, model.generator, teacher and teacher.generator)
    figure.savefig(folder / SAMPLES)
    found = {name: held for name, held in result.best.items() if name.startswith("samples/")}
    (folder / DISTANCES).write_text(json.dumps(found, indent=1) + "\n")
    return [folder / SAMPLES, folder / DISTANCES]


def evaluated(run: GenerativeConfig, result: Finished) -> Metrics:
    """``tested`` of a finished run, whose teacher must be finished too."""
    weights = None if run.teacher is None else run.teacher.weights
    if run.teacher is not None and run.teacher.run is not None:
        done = finished(run.teacher.run)
        if done is None:
            raise ValueError(f"its teacher is not trained: no {run.teacher.run.folder}")
        weights = done.weights
    return tested(run, result, GenerativeInputs(weights))


def tested(run: GenerativeConfig, result: Finished, inputs: GenerativeInputs) -> Metrics:
    """Every distance of the best model's samples, those from data now from the test part."""
    model, teacher = models_of(run, result, inputs)
    device, seen = pick_device(), evidence_of(run, "test")
    places = None if seen is None else np.arange(len(seen.rows))
    judge = judge_of(run, teacher, seen, device, places=places)
    found = judge.of_run(model.generator.to(device))
    return {f"test/{name.removeprefix('samples/')}": held for name, held in found.items()}
