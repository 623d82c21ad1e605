"""What a student learns without data, method by method, beside real data and beside noise.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/datafree.py digits [--seeds N] [--rows ROW ...]
       OMP_NUM_THREADS=1 python tests/benchmarks/datafree.py FashionMNIST ROOT [...]

One thread and process time, so that what else the machine does counts little. ROOT is a root of
torchvision's layout (ROOT/FashionMNIST/raw/*). Plain convolutional networks as teacher and student;
every student has the same optimiser, and the published methods a budget of CPU seconds rather than
of GPU hours (BUDGETS). The accuracy is that of the last step on the test part: without data there
is nothing to choose a better one by. Writes results/datafree_NAME.md beside this file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.datafree.batches import SyntheticBatches
from kdcore.datafree.draws import Draw
from kdcore.datafree.images import Normalisation
from kdcore.datafree.learning import published_step
from kdcore.datafree.plans import Method, Offline
from kdcore.datafree.presets import PRESETS
from kdcore.datafree.synthesis import Synthesizer
from kdcore.datafree.targets import Records, measure_records
from kdcore.datafree.transfer import transfer_set
from kdcore.models import convnet
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.teachers import freeze, teacher_outputs
from kdcore.types import Batch
from pipelines.config import DataConfig
from pipelines.sources import read_pictures
from pipelines.transfer import changed_plan

RESULTS = Path(__file__).parent / "results"
NORMALISATION = Normalisation((0.5,), (0.25,))
BATCH, STEPS, RATE = 128, 1000, 2e-3  # of every student
OFFLINE_PICTURES = 1024
LAYERS = {"block1": "block1", "block2": "block2", "block3": "block3"}
WIDTHS = {"digits": (25, 6), "FashionMNIST": (26, 9)}  # teacher, student
TEACHER_STEPS = {"digits": 600, "FashionMNIST": 1500}

_OFFLINE = {"images": {"lr": 0.1}, "schedule": {"batch_size": 256, "steps": 150}}
_T4 = {"losses": {"kd": {"params": {"temperature": 4.0}}}}
_THIN = {"network": {"latent": 64, "width": 32}}
_POOLED = {"student_steps": 10, "student_batch_size": BATCH, "batch_size": BATCH}
_NO_VIEW = {"view": {"crop": 1, "flip": False}, "student_view": {"crop": 1, "flip": False}}

# row: (preset, changes); every change is one of budget or picture size unless the row says so
BUDGETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "noise": ("noise", _T4),
    "lopes": ("lopes", {"schedule": {"batch_size": 256, "steps": 150}}),
    "zskd": ("zskd", {**_OFFLINE, "student_view": {"crop": 1, "flip": False}}),
    "soft_target": ("soft_target", {**_OFFLINE, **_T4}),
    "deepinversion": ("deepinversion", {**_OFFLINE, **_T4, "view": {"roll": 1}}),
    "adaptive_deepinversion": (
        "adaptive_deepinversion",
        {
            "schedule": {**_POOLED, "batch_size": 256, "steps": 150, "student_steps": 250},
            **_T4,
            "view": {"roll": 1, "flip": False},
            "student_view": {"crop": 1, "flip": False},
        },
    ),
    "dafl": (
        "dafl",
        {"images": {**_THIN, "lr": 2e-3}, "schedule": {"batch_size": BATCH, "rounds": 100}},
    ),
    "dafl + statistics": (
        "dafl",
        {
            "images": {**_THIN, "lr": 2e-3},
            "schedule": {"batch_size": BATCH, "rounds": 100, "student_steps": 5},
            "priors": {"statistics": {"weight": 1.0}},
        },
    ),
    "zskt": (
        "zskt",
        {"images": _THIN, "schedule": {"rounds": 50}},
    ),
    "zskt without maps": (
        "zskt",
        {"images": _THIN, "schedule": {"rounds": 50}, "losses": {"at": {"weight": 0.0}}},
    ),
    "dfq": (
        "dfq",
        {
            "images": _THIN,
            "schedule": {"batch_size": BATCH, "student_steps": 5, "rounds": 50, "warmup": 50},
            "priors": {
                "disagreement": {"after": 50},
                **{
                    name: {"weight": 0.1}
                    for name in ("statistics_divergence", "entropy", "balance")
                },
            },
        },
    ),
    "cmi": (
        "cmi",
        {
            "images": {**_THIN, "lr": 5e-3, "latent_lr": 5e-3},
            "schedule": {**_POOLED, "steps": 100, "student_steps": 125, "warmup": 1},
            "priors": {"masked_disagreement": {"after": 1}},
            **_NO_VIEW,
            **_T4,
        },
    ),
    **{
        f"fast ({kind})": (
            "fast",
            {
                "images": {**_THIN, "kind": kind, "lr": 5e-3, "latent_lr": 0.015, "meta_lr": 0.025},
                "schedule": {**_POOLED, "warmup": 10},
                "priors": {"masked_disagreement": {"after": 10}},
                **_NO_VIEW,
                **_T4,
            },
        )
        for kind in ("fomaml", "reptile", "sequential")
    },
}


@dataclass(frozen=True)
class Task:
    """A dataset in memory and the teacher that has seen it."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    teacher: Tapped
    num_classes: int = 10

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train[0].shape[1:])


@dataclass(frozen=True)
class Result:
    accuracy: float
    cpu_s: float


def read(name: str, root: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    data = DataConfig(name=name, root=root)
    parts = {part: read_pictures(data, part) for part in ("train", "test")}  # type: ignore[arg-type]
    return {
        part: (
            NORMALISATION.loaded(torch.from_numpy(held.image), torch.float32),
            torch.from_numpy(held.label),
        )
        for part, held in parts.items()
    }


def made_task(name: str, root: Path | None) -> Task:
    torch.manual_seed(0)
    parts = read(name, root)
    net = convnet(10, 1, width=WIDTHS[name][0])
    image, label = parts["train"]
    optimizer, schedule = optimised(net.parameters(), TEACHER_STEPS[name])
    for rows in rows_of(len(label), TEACHER_STEPS[name], seed=0):
        optimizer.zero_grad()
        F.cross_entropy(net(image[rows]), label[rows]).backward()
        optimizer.step()
        schedule.step()
    return Task(name, *parts.values(), freeze(Tapped(net, LAYERS)))


def optimised(
    parameters: Iterable[Tensor], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.Adam(parameters, RATE)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def rows_of(count: int, steps: int, *, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (BATCH,), generator=generator)


def accuracy(net: Tapped, test: tuple[Tensor, Tensor]) -> float:
    net.eval()
    with torch.no_grad():
        right = [
            (net(image).logits.argmax(dim=1) == label).double()
            for image, label in zip(test[0].split(1000), test[1].split(1000), strict=True)
        ]
    return float(torch.cat(right).mean())


def taught(task: Task, image: Tensor) -> Batch:
    said = teacher_outputs(task.teacher, image)
    rows = torch.arange(len(image))
    return Batch(image, said.logits.argmax(dim=1), rows, teacher=said)


def from_rows(task: Task, image: Tensor, method: Method, seed: int) -> Iterator[Batch]:
    """Random rows of a transfer set through the method's view, with what the teacher says."""
    for count, rows in enumerate(rows_of(len(image), STEPS, seed=seed)):
        draw = Draw(torch.arange(BATCH), count, seed)
        yield taught(task, method.student_view(image[rows], draw))


def offline(task: Task, method: Method, seed: int) -> Iterator[Batch]:
    made = transfer_set(
        task.teacher,
        method,
        shape=task.shape,
        normalisation=NORMALISATION,
        count=OFFLINE_PICTURES,
        seed=seed,
        records=records(task),
    )
    image = NORMALISATION.loaded(made.image, torch.float32)
    yield from from_rows(task, image, method, seed)


def records(task: Task) -> Records:
    image, label = task.train
    batches = zip(image.split(1000), label.split(1000), strict=True)
    return measure_records(task.teacher, (Batch(x, y, y) for x, y in batches), task.num_classes)


def online(task: Task, method: Method, student: Tapped, seed: int) -> Iterator[Batch]:
    made = Synthesizer(
        task.teacher,
        method,
        shape=task.shape,
        normalisation=NORMALISATION,
        students=[student],
        seed=seed,
    )
    batches = SyntheticBatches(made)
    for epoch in range(-(-steps_of(method) // batches.batches_per_epoch)):
        yield from batches.epoch(epoch)


def steps_of(method: Method) -> int:
    """ZSKT's student and DFQ's take more steps than the others, for each of the generator's."""
    return 2500 if method.student_mode == "train" else STEPS


def learned(step: DistillStep, batches: Iterable[Batch], steps: int) -> None:
    optimizer, schedule = optimised(step.parameters(), steps)
    for batch in batches:
        optimizer.zero_grad()
        step.train()(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), 5.0)
        optimizer.step()
        schedule.step()


def student_of(task: Task, seed: int) -> Tapped:
    torch.manual_seed(seed)
    return Tapped(convnet(10, 1, width=WIDTHS[task.name][1]), LAYERS)


def measured(task: Task, row: str, seed: int) -> Result:
    preset, changes = BUDGETS.get(row, ("noise", _T4))
    method: Method = changed_plan(PRESETS[preset], changes, (row,))
    student = student_of(task, seed)
    step = published_step(method, student, task.teacher, shape=task.shape, layers=LAYERS)
    started = time.process_time()
    if row == "real data":
        batches = from_rows(task, task.train[0], method, seed)
    elif isinstance(method.schedule, Offline):
        batches = offline(task, method, seed)
    else:
        batches = online(task, method, student, seed)
    learned(step, batches, steps_of(method))
    return Result(accuracy(student, task.test), time.process_time() - started)


def line(row: str, results: list[Result]) -> str:
    values = [100 * one.accuracy for one in results]
    spread = f"{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    seconds = statistics.fmean(one.cpu_s for one in results)
    seeds = " ".join(f"{value:.1f}" for value in values)
    return f"| {row} | {statistics.fmean(values):.1f} | {spread} | {seeds} | {seconds:.0f} |"


def main(print_line: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(WIDTHS))
    parser.add_argument("root", nargs="?", type=Path)
    parser.add_argument("--rows", nargs="*", default=["real data", *BUDGETS])
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    task = made_task(asked.name, asked.root)
    top = f"| teacher | {100 * accuracy(task.teacher, task.test):.1f} | | | |"
    head = ["| | accuracy % | sd | by seed | CPU s |", "|---|---:|---:|---|---:|", top]
    print_line("\n".join(head))
    lines = []
    for row in asked.rows:
        lines.append(line(row, [measured(task, row, seed) for seed in range(asked.seeds)]))
        print_line(lines[-1])
    if asked.rows == ["real data", *BUDGETS]:
        words = f"# Distillation without data on {asked.name}\n\n"
        words += f"`python tests/benchmarks/datafree.py {asked.name}`, one thread, "
        words += f"{asked.seeds} seeds, accuracy of the last step on the test part.\n\n"
        table = "\n".join([*head, *lines]) + "\n"
        (RESULTS / f"datafree_{asked.name.lower()}.md").write_text(words + table)


if __name__ == "__main__":
    main()
