"""What a student learns without data, method by method, beside real data and beside noise.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/datafree.py measure DATA WORK [--rows ROW ...]
           [--seeds 0 1 2] [--fashion-mnist FOLDER]
       python tests/benchmarks/datafree.py table WORK

DATA is digits or FashionMNIST, whose four published .gz files are in FOLDER. WORK holds the
teachers, and a line of ``measured.jsonl`` for every row and seed: what is there is not measured
again, so that this can be stopped and gone on with. ``table`` writes results/datafree.md.

One thread and process time, so that what else the machine does counts little. Plain convolutional
networks as teacher and student; every student but that of 8 bits has the same optimiser, and the
published methods a budget of CPU seconds rather than of GPU hours (``datafree_rows.py``). The
accuracy is that of the last step on the test part: without data there is nothing to choose a better
one by.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from datafree_networks import DATA, NETWORKS, NORMALISATIONS, TEACHER_STEPS, layers_of
from datafree_rows import (
    BATCH,
    BUDGETS,
    OFFLINE_PICTURES,
    QUANTISED,
    QUANTISED_RATE,
    QUANTISED_STEPS,
    RATE,
    REAL,
    SEEDS,
    TEACHER,
    TO_QUANTISE,
    digest_of,
    method_of,
    rows_of,
    steps_of,
)
from datafree_table import RESULTS, Measured, commit, read, table, write
from torch import Tensor

from kdcore.datafree.augmentation import Augmentation
from kdcore.datafree.batches import SyntheticBatches
from kdcore.datafree.draws import Draw
from kdcore.datafree.images import Normalisation
from kdcore.datafree.learning import published_step
from kdcore.datafree.plans import Method, Offline
from kdcore.datafree.synthesis import Synthesizer
from kdcore.datafree.targets import Records, measure_records
from kdcore.datafree.transfer import transfer_set
from kdcore.quantisation import rounded, with_integers
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.teachers import freeze, teacher_outputs
from kdcore.types import Batch, Outputs
from pipelines.datasets import DataConfig
from pipelines.sources import read_pictures

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist

Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A dataset in memory and the teacher that has seen it."""

    name: str
    train: Part
    test: Part
    teacher: Tapped
    num_classes: int = 10

    @property
    def normalisation(self) -> Normalisation:
        return NORMALISATIONS[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train[0].shape[1:])

    @property
    def layers(self) -> Mapping[str, str]:
        return layers_of(self.name)

    def student(self) -> Tapped:
        return Tapped(NETWORKS[self.name]["student"].build(self.num_classes), self.layers)


# --- the data and its teacher -----------------------------------------------------------------


def made_task(name: str, work: Path, packed: Path) -> Task:
    parts = _read(name, _unpacked(packed, work) if name == "FashionMNIST" else None)
    torch.manual_seed(0)
    net, layers = NETWORKS[name]["teacher"].build(10), layers_of(name)
    weights = work / f"teacher_{name}_{digest_of(TEACHER, name)}.pt"
    if weights.exists():
        net.load_state_dict(torch.load(weights, weights_only=True))
        return Task(name, *parts, freeze(Tapped(net, layers)))
    started = time.process_time()
    _train(net, parts[0], TEACHER_STEPS[name])
    task = Task(name, *parts, freeze(Tapped(net, layers)))
    write(work, _told(task, TEACHER, 0, task.teacher, started))
    torch.save(net.state_dict(), weights)
    return task


def _unpacked(packed: Path, work: Path) -> Path:
    """A root of torchvision's layout, which wants the published files unpacked."""
    raw = work / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for file in packed.glob("*.gz"):
        with gzip.open(file) as source, (raw / file.stem).open("wb") as target:
            shutil.copyfileobj(source, target)
    return work


def _read(name: str, root: Path | None) -> tuple[Part, Part]:
    data = DataConfig(name=name, root=root)
    return _loaded(data, "train"), _loaded(data, "test")


def _loaded(data: DataConfig, part: str) -> Part:
    held = read_pictures(data, part)  # type: ignore[arg-type]
    image = NORMALISATIONS[data.name].loaded(torch.from_numpy(held.image), torch.float32)
    return image, torch.from_numpy(held.label)


def _train(net: torch.nn.Module, part: Part, steps: int) -> None:
    image, label = part
    optimizer, schedule = _optimised(net.parameters(), steps, RATE)
    for rows in _rows(len(label), steps, seed=0):
        optimizer.zero_grad()
        F.cross_entropy(net(image[rows]), label[rows]).backward()
        optimizer.step()
        schedule.step()


# --- one student ------------------------------------------------------------------------------


def measured(task: Task, row: str, seed: int) -> Iterator[Measured]:
    """What a row's student has learned; then what is left of it in 8 bits, where that is a row."""
    method, steps = method_of(row, task.name), steps_of(row, task.name)
    torch.manual_seed(seed)
    student = task.student()
    step = published_step(method, student, task.teacher, shape=task.shape, layers=task.layers)
    started = time.process_time()
    offline = isinstance(method.schedule, Offline)
    made = None if offline else _synthetic(task, method, student, seed)
    if row == REAL:
        batches = _from_rows(task, task.train[0], method, steps, seed)
    elif made is None:
        batches = _offline(task, method, steps, seed)
    else:
        batches = _epochs(made, steps)
    _learn(step, batches, steps)
    yield _told(task, row, seed, student, started)
    if row == TO_QUANTISE and made is not None:
        yield _told(task, QUANTISED, seed, _quantised(task, made, student), started)


def _measured_with(row: str) -> tuple[str, ...]:
    """The rows of one student."""
    return (row, QUANTISED) if row == TO_QUANTISE else (row,)


def _told(task: Task, row: str, seed: int, student: Tapped, started: float) -> Measured:
    spent = time.process_time() - started
    right = accuracy(student, task.test)
    return Measured(task.name, row, seed, right, spent, digest_of(row, task.name), commit())


def _quantised(task: Task, made: SyntheticBatches, student: Tapped) -> Tapped:
    """A trained student with 8 bits, trained as such for a while, with bytes for weights.

    Its generator is the one that has taught it, and goes on.
    """
    method = made.synthesizer.method
    learner = Tapped(rounded(student.net, 8), task.layers)
    step = published_step(method, learner, task.teacher, shape=task.shape, layers=task.layers)
    going_on = _synthetic(task, method, learner, made.synthesizer.seed)
    going_on.load_state_dict(made.state_dict())
    _learn(step, _epochs(going_on, QUANTISED_STEPS), QUANTISED_STEPS, QUANTISED_RATE)
    return Tapped(with_integers(learner.net.eval()))


def _offline(task: Task, method: Method, steps: int, seed: int) -> Iterator[Batch]:
    made = transfer_set(
        task.teacher,
        method,
        shape=task.shape,
        normalisation=task.normalisation,
        count=OFFLINE_PICTURES[task.name],
        seed=seed,
        records=_records(task),
    )
    image = task.normalisation.loaded(made.image, torch.float32)
    yield from _from_rows(task, image, method, steps, seed)


def _records(task: Task) -> Records:
    image, label = task.train
    batches = zip(image.split(1000), label.split(1000), strict=True)
    return measure_records(task.teacher, (Batch(x, y, y) for x, y in batches), task.num_classes)


def _from_rows(task: Task, image: Tensor, method: Method, steps: int, seed: int) -> Iterator[Batch]:
    """Random rows of pictures through the method's view, with what the teacher says of it."""
    viewed = method.student_view != Augmentation()
    held = None if viewed else _answers(task.teacher, image)  # asked once for all steps
    for count, rows in enumerate(_rows(len(image), steps, seed=seed)):
        draw = Draw(torch.arange(BATCH), count, seed)
        seen = method.student_view(image[rows], draw, task.normalisation)
        said = teacher_outputs(task.teacher, seen).logits if held is None else held[rows]
        answers = Outputs(said, {}, task.teacher.head)
        yield Batch(seen, said.argmax(dim=1), rows, teacher=answers)


def _answers(teacher: Tapped, image: Tensor) -> Tensor:
    return torch.cat([teacher_outputs(teacher, part).logits for part in image.split(1000)])


def _synthetic(task: Task, method: Method, student: Tapped, seed: int) -> SyntheticBatches:
    made = Synthesizer(
        task.teacher,
        method,
        shape=task.shape,
        normalisation=task.normalisation,
        students=[student],
        seed=seed,
    )
    return SyntheticBatches(made)


def _epochs(batches: SyntheticBatches, steps: int) -> Iterator[Batch]:
    epochs, rest = divmod(steps, batches.batches_per_epoch)
    if rest:
        raise ValueError(f"{steps} steps are no whole epochs of {batches.batches_per_epoch}")
    for epoch in range(epochs):
        yield from batches.epoch(epoch)


def _learn(step: DistillStep, batches: Iterable[Batch], steps: int, rate: float = RATE) -> None:
    optimizer, schedule = _optimised(step.parameters(), steps, rate)
    for batch in batches:
        optimizer.zero_grad()
        step.train()(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), 5.0)
        optimizer.step()
        schedule.step()


def _optimised(
    parameters: Iterable[Tensor], steps: int, rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.Adam(parameters, rate)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _rows(count: int, steps: int, *, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (BATCH,), generator=generator)


def accuracy(net: Tapped, test: Part) -> float:
    net.eval()
    with torch.no_grad():
        right = [
            (net(image).logits.argmax(dim=1) == label).double()
            for image, label in zip(test[0].split(1000), test[1].split(1000), strict=True)
        ]
    return float(torch.cat(right).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure")
    measure.add_argument("data", choices=DATA)
    measure.add_argument("work", type=Path)
    measure.add_argument("--rows", nargs="*", choices=[REAL, *BUDGETS])
    measure.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    measure.add_argument("--fashion-mnist", type=Path, default=FASHION_MNIST)
    commands.add_parser("table").add_argument("work", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.command == "table":
        RESULTS.write_text(table(asked.work))
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    task = made_task(asked.data, asked.work, asked.fashion_mnist)
    # the teacher is measured as it is trained, eight bits with the row that they go on from
    rows = asked.rows or [row for row in rows_of(asked.data) if row not in (TEACHER, QUANTISED)]
    for seed in asked.seeds:
        for row in rows:
            held = read(asked.work)
            if all((asked.data, one, seed) in held for one in _measured_with(row)):
                continue
            for one in measured(task, row, seed):
                write(asked.work, one)
                print(f"{one.row}, seed {seed}: {one.accuracy:.1%}, {one.cpu_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
