"""What a cache costs and what it saves: writing, reading, bytes, memory, and when it pays.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/cache.py [build] [actors] [read] [size] [runs] ...

One thread, process time, noise of CIFAR's size (3x32x32, uint8, 100 classes). Issue 6 asks:
writing at 0.95 of a bare loop of the same teacher at the same batch size, reading 40,000 rows/s per
core from memory and 15,000 from files, bytes per row within 5 % of specs/peers.md 3b, memory of
reading from files that does not grow with the rows, and from when on a cache wins.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from kdcore.losses.logits import kd
from kdcore.models import MODELS
from kdcore.taps import Tapped
from kdcore.teachers import freeze
from kdcore.types import Outputs
from pipelines import jobs
from pipelines.cache.columns import Column, columns_of, layer_column, logits_column, to_parquet
from pipelines.cache.forward import ROWS_PER_FORWARD, PartWriter
from pipelines.cache.parts import Part
from pipelines.cache.storage import store_at
from pipelines.cache.write import write_cache
from pipelines.cluster import cluster
from pipelines.config import RunConfig
from pipelines.data import Reader, TeacherRows
from pipelines.formats import TopConfig
from pipelines.models import build_network, save_weights
from pipelines.networks import ModelConfig
from pipelines.rows import FileRows, RowsWriter
from pipelines.sources import Pictures
from pipelines.strict import validated
from pipelines.tracking import Tracker
from pipelines.train import train_here
from pipelines.views import normalised

CLASSES, ROWS = 100, 50_000
ACTORS_ROWS = 20 * 2048  # twenty files a view
WRITTEN, STEPS, ROUNDS = 256, 2, 3  # rows of a file that is written, steps of a student
EPOCHS, VIEWS, BATCH = 240, 16, 64  # of one trial, as the literature trains
REAL: dict[str, Any] = {
    "student": {"name": "resnet8"},
    "data": {"name": "digits", "size": 32, "views": 1, "augment": {"crop": 4}},
    "epochs": 8,
    "losses": {"ce": {}, "kd": {}},
}
RUN_COLUMNS = ("1 trial, live", "cached", "2 trials, live", "cached")


def run_of(batch: int = BATCH) -> RunConfig:
    augment = {"crop": 4, "flip": True}
    data = {"name": "digits", "views": 1, "augment": augment, "mean": [0.5] * 3, "std": [0.25] * 3}
    teacher = {"name": "resnet32x4", "weights": "none.safetensors"}
    content = {"student": {"name": "resnet8x4"}, "teacher": teacher, "data": data, "epochs": 1}
    losses = {"ce": {}, "kd": {}}
    return validated(RunConfig, content | {"batch_size": batch, "losses": losses}, where="noise")


def noise(count: int) -> Pictures:
    drawn = np.random.default_rng(0)
    image = drawn.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    return Pictures(image, drawn.integers(0, CLASSES, count), CLASSES)


def network(name: str) -> Tapped:
    torch.manual_seed(0)
    return Tapped(MODELS[name](CLASSES, 3))


def least(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds of process time of the fastest of some rounds: what else runs only adds."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def table(heading: str, *columns: str) -> None:
    print(f"\n| {' | '.join([heading, *columns])} |\n|---|{'---:|' * len(columns)}")


def build() -> None:
    """A part through ``PartWriter``, to Parquet on disk, beside the teacher alone."""
    teacher, pictures = freeze(network("resnet32x4")), noise(WRITTEN)
    rows = np.arange(WRITTEN)

    def bare() -> None:
        for start in range(0, WRITTEN, ROWS_PER_FORWARD):
            image = torch.from_numpy(pictures.image[start : start + ROWS_PER_FORWARD])
            shown = normalised(image, mean=[0.5] * 3, std=[0.25] * 3)
            with torch.inference_mode():
                teacher(shown.contiguous(memory_format=torch.channels_last))

    with tempfile.TemporaryDirectory() as folder:
        run, store = run_of(), store_at(folder)
        started = time.process_time()
        writer = PartWriter(run, pictures, teacher, store, device=torch.device("cpu"))
        start_cost = time.process_time() - started
        columns = columns_of("float16", teacher)
        numbers = iter(range(100))

        def cached() -> None:
            writer.write(Part(1, next(numbers), rows), columns)

        bare()
        # turn by turn, so that what the machine does meanwhile meets both
        pairs = [(least(bare, 1), least(cached, 1)) for _ in range(ROUNDS)]
    alone, written = (WRITTEN / min(times) for times in zip(*pairs, strict=True))
    table("resnet32x4, batches of 128", "images/s per core")
    print(f"| bare loop | {alone:.1f} |\n| cache: view, teacher, Parquet | {written:.1f} |")
    print(f"\nratio {written / alone:.3f}, asked 0.95; a writer starts in {start_cost:.2f} s")


def actors() -> None:
    """The whole of ``write_cache`` by Ray, wall time, with one actor and with two: needs two cores.

    The rate is of the files after the first of each actor; what comes before is the start.
    """
    table("resnet20, actors", "images/s", "start, s")
    for count in (1, 2):
        told = written_by(count)
        (first, rows), (last, every) = told[count], told[-1]
        rate = (every - rows) / (last - first)
        print(f"| {count} | {rate:.0f} | {first - rows / rate:.1f} |", flush=True)


def written_by(count: int) -> list[tuple[float, int]]:
    """Seconds since the start and rows that are done, as a cache is written by so many actors."""
    teacher, pictures = freeze(network("resnet20")), noise(ACTORS_ROWS)
    told: list[tuple[float, int]] = []
    one = patch("pipelines.cache.write.workers_at_once", lambda: count)
    with tempfile.TemporaryDirectory() as folder, one, cluster():
        columns, began = columns_of("float16", teacher), time.perf_counter()

        def watch(done: int, total: int, *note: str) -> None:
            told.append((time.perf_counter() - began, done))

        write_cache(run_of(), pictures, teacher, store_at(folder), columns, watch)
    return told


def spooled(folder: Path, name: str, held: Iterator[np.ndarray], count: int) -> FileRows:
    """Blocks of rows as a flat file."""
    first = next(held)
    writer = RowsWriter(folder / f"{name}.npy", count, first.shape[1:], first.dtype)
    start = 0
    for block in (first, *held):
        writer.put(np.arange(start, start + len(block)), block)
        start += len(block)
    return writer.close()


def read() -> None:
    """An epoch of the reader with the teacher's logits, views replayed and normalised."""
    pictures = noise(ROWS)
    drawn = np.random.default_rng(1)
    logits = [drawn.standard_normal((ROWS, CLASSES), np.float32).astype(np.float16)] * 2
    table("reader, rows/s per core", *(f"batches of {batch}" for batch in (64, 256)))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        files = Pictures(
            spooled(place, "image", iter([pictures.image]), ROWS), pictures.label, CLASSES
        )
        flat = [spooled(place, "logits", iter(logits[:1]), ROWS)] * 2
        for name, seen, said in (("memory", pictures, logits), ("data.spool", files, flat)):
            rates = [ROWS * 0.9 / epoch_s(run_of(batch), seen, said) for batch in (64, 256)]
            print(f"| {name} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")
    print("\nasked: 40,000 from memory, 15,000 from files")


def epoch_s(run: RunConfig, pictures: Pictures, logits: Any) -> float:
    reader = Reader(run, pictures, {"teacher": TeacherRows(logits, {})})
    return least(lambda: [None for _ in reader.train(0)])


# Bytes per row of specs/peers.md 3b: zstd of Gaussian logits, of a ReLU's embedding where said.
SPEC: Mapping[str, tuple[int, str, float]] = {
    "CIFAR-10 logits, float16": (10, "float16", 20.7),
    "CIFAR-100 logits, float16": (100, "float16", 186),
    "CIFAR-100 logits, uint8": (100, "uint8", 104),
    "ImageNet logits, float16": (1000, "float16", 1845),
    "ImageNet logits, uint8": (1000, "uint8", 1004),
    "ImageNet top-10": (1000, "10", 35.3),
    "ImageNet top-50": (1000, "50", 154),
    "embedding 512, after a ReLU": (512, "embedding", 610),
}


def size() -> None:
    """Bytes per row of one column's own values, of 2,048 rows."""
    drawn = torch.Generator().manual_seed(0)
    table("column", "bytes/row", "specs/peers.md", "ratio")
    for name, (width, kept, expected) in SPEC.items():
        values = 3 * torch.randn(2048, width, generator=drawn)
        outputs = Outputs(values, {"embedding": values.relu()})
        encoded = column_of(kept).encoded(outputs, values.argmax(dim=1).numpy())
        held = to_parquet(pa.table(encoded)).size / 2048
        print(f"| {name} | {held:,.1f} | {expected:,} | {held / expected:.3f} |")


def column_of(kept: str) -> Column:
    if kept == "embedding":
        return layer_column("embedding")
    return logits_column(TopConfig(top=int(kept)) if kept.isdigit() else kept)  # type: ignore[arg-type]


def memory() -> None:
    """Peak memory of processes that read an epoch of so many rows from files."""
    table("rows in files", "on disk, MiB", "peak of a reader beyond its start, MiB")
    for count in (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tests.pipelines.read_spool", folder, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            disk, peak = (int(word) for word in done.stdout.split())
        print(f"| {count:,} | {disk / 2**20:,.1f} | {peak / 2**20:,.1f} |")


def pays() -> None:
    """When a cache wins: steps and forward passes are measured, whole trials are sums of them."""
    teacher, student = freeze(network("resnet32x4")), network("resnet8x4").train()
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    image, label = torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH) % CLASSES
    said = teacher(image).logits

    def step(live: bool) -> None:
        for _ in range(STEPS):
            with torch.inference_mode():
                heard = teacher(image).logits if live else said
            logits = student(image).logits
            loss = F.cross_entropy(logits, label) + kd(logits, heard.clone())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def forward() -> None:
        with torch.inference_mode():
            teacher(image)

    step(live=True)
    online, cached = (1e3 * least(lambda live=live: step(live)) / STEPS for live in (True, False))
    asked = 1e3 * least(forward)
    table(f"batch of {BATCH}", "process ms")
    print(f"| step, teacher live | {online:.0f} |\n| step, teacher cached | {cached:.0f} |")
    print(f"| teacher alone, as a cache is written | {asked:.0f} |")
    table(f"views of {EPOCHS} epochs", "wins from epoch", "1 trial", "10 trials", "100 trials")
    for views in (1, 4, VIEWS):
        cost = (views + 1) * asked  # view 0 too
        gains = [trials * EPOCHS for trials in (1, 10, 100)]
        times = [online * steps / (cost + cached * steps) for steps in gains]
        first = cost / (online - cached)
        print(f"| {views} | {first:.1f} | " + " | ".join(f"{gain:.2f}x" for gain in times) + " |")


def runs() -> None:
    """Real runs beside each other, wall time: the teacher live, and a cache that is written first.

    Of each run the time since its beginning is noted at the end of every epoch. The second trial
    has another seed and finds the cache written.
    """
    table(f"digits at 32x32, {REAL['student']['name']} from a resnet56", *RUN_COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "teacher.safetensors"
        teacher = build_network(ModelConfig(name="resnet56"), num_classes=10, in_channels=1)
        for _ in range(20):  # else BatchNorm knows nothing of what it sees, and the logits explode
            teacher.train()(torch.randn(64, 1, 32, 32))
        save_weights(teacher.state_dict(), weights)
        spent = {source: times_of(source, weights, Path(folder)) for source in ("live", "cached")}
    for epoch in range(REAL["epochs"]):
        live, cached = ([trial[epoch] for trial in spent[source]] for source in spent)
        cells = [live[0], cached[0], sum(live), sum(cached)]
        print(f"| {epoch + 1} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


def times_of(source: str, weights: Path, folder: Path) -> list[list[float]]:
    """Seconds from each trial's beginning to the end of each of its epochs."""
    trials = []
    with cluster():  # started before the clock: a sweep starts it with or without a cache
        for seed in (0, 1):
            content = {**REAL, "seed": seed, "runs": str(folder / source)}
            content["teacher"] = {"name": "resnet56", "weights": str(weights), "source": source}
            content["caches"] = str(folder / "caches")
            run = validated(RunConfig, content, where=source)
            began, ends = time.perf_counter(), list[float]()
            inputs = jobs.prepared(run, watch=lambda *told: None, tracker=Tracker())
            train_here(run, inputs, lambda told: ends.append(time.perf_counter() - began))  # noqa: B023
            trials.append(ends)
    return trials


PARTS = {
    **{"build": build, "actors": actors, "read": read},
    **{"size": size, "memory": memory, "pays": pays, "runs": runs},
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
