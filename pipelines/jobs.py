"""A run from nothing to a finished folder: its teacher first, then the cache, then the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from torch import nn

from kdcore.taps import Tapped
from kdcore.teachers import freeze
from kdcore.types import Classifier
from pipelines.build import build_student, build_teacher, build_used, checked
from pipelines.cache.columns import Column, columns_of
from pipelines.cache.forward import PartWriter
from pipelines.cache.inspection import damaged_files, greatest_differences
from pipelines.cache.manifest import cache_store, contents, fingerprint, is_complete
from pipelines.cache.read import read_cache
from pipelines.cache.storage import Store
from pipelines.cache.write import write_cache
from pipelines.cluster import cluster
from pipelines.config import RunConfig, TeacherConfig
from pipelines.data import Reader, TeacherRows, whole
from pipelines.diagnostics import Matched, matched
from pipelines.digests import plain
from pipelines.figures import EMBEDDING, joint_embedding, learning_curves, risk_bounds
from pipelines.generative.inputs import GenerativeInputs
from pipelines.loop import Metrics, evaluate, pick_device
from pipelines.models import Served, load_weights
from pipelines.runs import Run
from pipelines.sources import Pictures, has_test_part, read_pictures, split
from pipelines.synthesize import (
    check_teacher_of,
    is_made,
    sample_of_shard,
    teacher_of,
    write_transfer_set,
)
from pipelines.synthetic import sample_of
from pipelines.tracking import TrackedInput, TrackedRun, Tracker
from pipelines.train import (
    Finished,
    Inputs,
    OnEpoch,
    RunInputs,
    Teacher,
    finished,
    train_here,
    train_on_workers,
)
from pipelines.training import with_teachers
from pipelines.transfer import TransferConfig

# Told of progress: the stage, how much of it is done and of how much, a note.
Watch = Callable[[str, int, int, str], None]
PICTURES_DRAWN = 300


def prepared(
    run: RunConfig,
    *,
    watch: Watch,
    tracker: Tracker,
    verbose: bool = False,
    layers: Mapping[str, Iterable[str]] = MappingProxyType({}),
) -> Inputs:
    """What the run trains on, its teachers trained and their caches written where they are not yet.

    ``layers`` are what other runs read that will share these inputs: of each teacher that they hear
    some layers. A teacher that nobody hears is left out.
    """
    pictures = checked(run)
    teachers = {
        label: _ready(
            run,
            label,
            pictures,
            {*run.teacher_layers.get(label, ()), *layers.get(label, ())},
            watch=watch,
            tracker=tracker,
            verbose=verbose,
        )
        for label in run.teachers
        if label in {*run.heard, *layers}
    }
    return Inputs(pictures, teachers)


def _ready(
    run: RunConfig,
    label: str,
    pictures: Pictures,
    layers: Iterable[str],
    *,
    watch: Watch,
    tracker: Tracker,
    verbose: bool,
) -> Teacher:
    """A teacher live or from its cache, trained and written first where they are not yet."""
    weights, teacher = _opened(run, label, pictures, layers, watch=watch, tracker=tracker)
    if run.teachers[label].source == "live":
        return Teacher(weights, live=teacher)
    cache = _cache_of(run, label, pictures, teacher)
    if not is_complete(cache.store, cache.columns, run.data.views):
        stage = "cache" if len(run.teachers) == 1 else f"cache {label}"
        with cluster(verbose=verbose):
            write_cache(
                cache.run, pictures, teacher, cache.store, cache.columns, partial(watch, stage)
            )
    data = run.data
    rows = read_cache(cache.store, cache.columns, pictures, views=data.views, spool=data.spool)
    rows = replace(rows, classifier=Classifier(*(held.detach() for held in teacher.head)))
    accuracy = _accuracy(run, pictures, rows)
    return Teacher(weights, rows=rows, fingerprint=cache.fingerprint, accuracy=accuracy)


def _opened(
    run: RunConfig,
    label: str,
    pictures: Pictures,
    layers: Iterable[str],
    *,
    watch: Watch,
    tracker: Tracker,
) -> tuple[Path, Tapped]:
    """A teacher's weights, trained first where it is another run's student, and it with them."""
    teacher = run.teachers[label]
    weights = teacher_weights(teacher, watch=watch, tracker=tracker)
    place = run.called(label)
    return weights, build_teacher(teacher, pictures, layers, weights=weights, place=place)


class _Cache(NamedTuple):
    """What a teacher's cache is made of, and where it is or will be."""

    run: RunConfig  # with this teacher alone
    store: Store
    columns: Sequence[Column]
    fingerprint: str


def _cache_of(run: RunConfig, label: str, pictures: Pictures, teacher: Tapped) -> _Cache:
    alone = run.taught_by(label)
    content = contents(alone, pictures, teacher)
    columns = columns_of(run.teachers[label].logits, teacher)
    return _Cache(alone, cache_store(alone.caches, content), columns, fingerprint(content))


def cache_faults(run: RunConfig, *, watch: Watch, tracker: Tracker) -> Mapping[str, list[str]]:
    """What is wrong with the caches of a run's teachers, by label: nothing, if they are sound.

    Every finished file is read again, and the teacher says again what it said of some rows.

    Raises ValueError for a cache that is not written yet.
    """
    pictures = checked(run)
    faults = {}
    for label, layers in run.teacher_layers.items():
        if run.teachers[label].source == "cached":
            _, teacher = _opened(run, label, pictures, layers, watch=watch, tracker=tracker)
            cache = _cache_of(run, label, pictures, teacher)
            writer = PartWriter(cache.run, pictures, teacher, cache.store, device=pick_device())
            faults[label] = _faults(writer, cache.columns)
    return faults


def _faults(writer: PartWriter, columns: Sequence[Column]) -> list[str]:
    """What is wrong with the cache of a writer; its numbers, where every file is as written."""
    store = writer.store
    if not is_complete(store, columns, writer.run.data.views):
        raise ValueError(f"cache {store} is not complete; run `kd cache` first")
    damaged = [f"{name} is gone or has changed" for name in damaged_files(store)]
    if damaged:
        return damaged
    off = greatest_differences(store, columns, writer, np.random.default_rng())
    return [
        f"{store / name}: the teacher differs by {times:.3g} times what is tolerated"
        for name, times in off.items()
        if times > 1
    ]


def teacher_weights(teacher: TeacherConfig, *, watch: Watch, tracker: Tracker) -> Path:
    """The teacher's weights, trained first where it is another run's student."""
    if teacher.run is not None:
        return train(teacher.run, watch=watch, tracker=tracker).weights
    if teacher.weights is None:
        raise ValueError(f"teacher {teacher.title!r} has neither weights nor a run")
    return teacher.weights


def train(run: RunConfig, *, watch: Watch, tracker: Tracker, verbose: bool = False) -> Finished:
    """The run's student, trained, or found trained; tracked with its numbers and its network."""
    done = finished(run)
    if done is not None:
        watch(run.name, run.epochs, run.epochs, f"found finished in {done.folder}")
        return done
    inputs = prepared(run, watch=watch, tracker=tracker, verbose=verbose)
    with start_tracking(run, inputs, tracker) as tracked:
        result = trained(run, inputs, follower(run, tracked, watch), verbose=verbose)
        student = served_student(run, result, inputs.pictures)
        tracked.log_student(student, inputs.pictures.image[:2])
        for path in _draw_run(run, result, inputs):
            tracked.log_artifact(path)
    return result


def trained(run: Run, inputs: RunInputs, on_epoch: OnEpoch, *, verbose: bool) -> Finished:
    """Train a run of any kind: in this process, or on its workers."""
    if run.workers == 1:
        return train_here(run, inputs, on_epoch)
    with cluster(verbose=verbose):
        return train_on_workers(run, inputs, on_epoch)


def start_tracking(
    run: Run, inputs: RunInputs, tracker: Tracker, parent: TrackedRun | None = None
) -> TrackedRun:
    """A tracked run with every configuration value as a parameter."""
    tags = {"kd.seed": str(run.seed), "kd.cache": inputs.fingerprint, "kd.identity": run.identity}
    tracked = tracker.start(run.folder.name, params=plain(run), tags=tags, parent=parent)
    tracked.log_inputs(tracked_inputs(run, inputs))
    return tracked


def tracked_inputs(run: Run, inputs: RunInputs) -> list[TrackedInput]:
    """The data and the caches that a run is trained on."""
    if isinstance(inputs, GenerativeInputs):
        data = [TrackedInput(*inputs.data, "training")] if inputs.data else []
        return data + _tracked_cache(run, inputs)
    assert isinstance(run, RunConfig)
    assert isinstance(inputs, Inputs)
    source = str(run.data.root or run.data.name)
    held = [TrackedInput(run.data.name, inputs.pictures.digest, source, "training")]
    for label, teacher in inputs.teachers.items():
        if teacher.fingerprint and label in run.heard:
            name, folder = f"{run.data.name} as {label} sees it", str(run.caches)
            held.append(TrackedInput(name, teacher.fingerprint, folder, "teacher cache"))
    return held


def _tracked_cache(run: Run, inputs: GenerativeInputs) -> list[TrackedInput]:
    if not inputs.fingerprint:
        return []
    return [TrackedInput("teacher's runs", inputs.fingerprint, str(run.caches), "teacher cache")]


def follower(run: Run, tracked: TrackedRun, watch: Watch) -> OnEpoch:
    """Logs every epoch once, though a resumed run may tell of one again."""
    seen = tracked.last_epoch

    def follow(metrics: Metrics) -> None:
        nonlocal seen
        epoch = int(metrics["epoch"])
        if epoch <= seen:
            return
        seen = epoch
        tracked.log(metrics, epoch=epoch)
        sample = sample_of(run, epoch)
        if sample.exists():
            tracked.log_artifact(sample)
        chosen_by = run.selects[0]
        watch(run.name, epoch, run.epochs, f"{chosen_by} {metrics[chosen_by]:.4f}")

    return follow


def served_student(run: RunConfig, result: Finished, pictures: Pictures) -> Served:
    """The run's best student as it is used, taking pixels as they are stored."""
    net = build_used(run, pictures, result.weights)
    return Served(net, mean=run.data.mean, std=run.data.std)


def _draw_run(run: RunConfig, result: Finished, inputs: Inputs) -> list[Path]:
    """Draw what one run measured, and where its best student stands."""
    histories = {run.name: [result.history]}
    drawn = {"curves": learning_curves(histories)}
    if run.diagnostics.bounds:
        drawn["bounds"] = risk_bounds(histories)
    for name, figure in drawn.items():
        figure.savefig(result.folder / f"{name}.png")
    paths = [result.folder / f"{name}.png" for name in drawn]
    return paths + draw_embedding(run, result, inputs, folder=result.folder)


def draw_embedding(run: RunConfig, result: Finished, inputs: Inputs, *, folder: Path) -> list[Path]:
    """Draw the best student and a teacher in one plane, where they have embeddings of one width."""
    if not inputs.teachers:
        return []
    pair = matched_student(run, result, inputs)
    if pair.student.shape != pair.teacher.shape:
        return []
    joint_embedding(pair).savefig(folder / EMBEDDING)
    return [folder / EMBEDDING]


def matched_student(run: RunConfig, result: Finished, inputs: Inputs) -> Matched:
    """The best student beside a teacher on the pictures of a figure.

    It is the one that ``diagnostics.teacher`` names if that is ready, else the first.
    """
    named = run.diagnostics.teacher
    inputs = inputs.only([named if named in inputs.teachers else next(iter(inputs.teachers))])
    student = build_student(run, inputs.pictures)
    load_weights(student.net, result.weights)
    device = pick_device()
    batches = Reader(run, inputs.pictures, inputs.rows).held_out(PICTURES_DRAWN)
    batches = with_teachers(run, batches, inputs.live(device), device)
    return matched(student.to(device), batches)


def tested(run: RunConfig, net: nn.Module) -> Metrics:
    """A network's metrics on the test part, which nothing else looks at; {} where there is none."""
    if not has_test_part(run.data):
        return {}
    pictures, device = read_pictures(run.data, "test"), pick_device()
    network = freeze(Tapped(net)).to(device)
    return evaluate(network, whole(run, pictures), device=device, prefix="test")


def trained_student(run: RunConfig, result: Finished) -> nn.Module:
    """The best student of a run as it is used."""
    return build_used(run, read_pictures(run.data, "train"), result.weights)


def _accuracy(run: RunConfig, pictures: Pictures, rows: TeacherRows) -> float:
    """Share of the validation split that a cached teacher gets right, unaugmented."""
    _, held_out = split(len(pictures.label), run.data)
    right = rows.logits[0][held_out].argmax(axis=1) == pictures.label[held_out]
    return float(np.mean(right))


def synthesize(
    config: TransferConfig, *, watch: Watch, tracker: Tracker, verbose: bool = False
) -> Path:
    """The folder of a transfer set, its teacher trained and its pictures made where they are not.

    Tracked shard by shard with what was measured and, now and then, a sample of the pictures.

    Raises ValueError, before anything is trained, for a teacher that the method has no use for.
    """
    folder = config.folder
    if is_made(folder):
        return folder
    check_teacher_of(config)
    weights = teacher_weights(config.teacher, watch=watch, tracker=tracker)
    teacher = teacher_of(config, weights)
    tags = {"kd.seed": str(config.seed), "kd.identity": config.identity, "kd.kind": "transfer set"}
    with tracker.start(folder.name, params=plain(config), tags=tags) as tracked:

        def follow(shard: int, done: int, total: int, metrics: Metrics) -> None:
            tracked.log(metrics, epoch=shard)
            sample = sample_of_shard(folder, shard)
            if sample.exists():
                tracked.log_artifact(sample)
            watch("synthesize", done, total, "")

        with cluster(verbose=verbose):
            write_transfer_set(config, teacher, follow)
    return folder
