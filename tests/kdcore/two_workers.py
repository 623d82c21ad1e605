"""One of two gloo workers: the gradient of every loss under DDP beside that of one process.

Usage: python two_workers.py RANK FOLDER, as ``gloo.py`` calls it. What is measured of a case is the
value of the loss under the name "loss", the gradient of each parameter under the parameter's, what
each buffer holds afterwards under the buffer's; after two steps without an optimiser.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdcore.losses import LOSSES, Loss, Stateful
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.teachers import freeze, taught
from kdcore.types import Batch, Outputs, Probe
from tests.gloo import NUM_WORKERS, joined, mean_over_workers

NUM_ROWS = 6
NUM_CLASSES = 5
MAP = {"map": "map"}
MAPS = {"early": "early", "map": "map"}  # for losses that may see several layers together


def network(width: int, stride: int) -> Tapped:
    """Convolutions and a classifier; no BatchNorm, whose statistics each worker has alone."""
    net = nn.Sequential(
        OrderedDict(
            early=nn.Conv2d(3, width - 1, 3, padding=1),
            bend=nn.Tanh(),
            map=nn.Conv2d(width - 1, width, 3, stride, padding=1),
            activation=nn.Tanh(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(width, NUM_CLASSES),
        )
    )
    return Tapped(net, ["early", "map"]).double()


def whole_batch() -> Batch:
    teacher = freeze(network(width=4, stride=2))
    image = torch.randn(NUM_ROWS, 3, 8, 8, dtype=torch.float64)
    label = torch.randint(NUM_CLASSES, (NUM_ROWS,))
    return next(taught([Batch(image, label, torch.arange(NUM_ROWS), epoch=2.5)], teacher))


def half(batch: Batch, rank: int) -> Batch:
    rows = slice(rank * NUM_ROWS // NUM_WORKERS, (rank + 1) * NUM_ROWS // NUM_WORKERS)
    assert batch.teacher is not None
    features = {layer: feature[rows] for layer, feature in batch.teacher.features.items()}
    return replace(
        batch,
        image=batch.image[rows],
        label=batch.label[rows],
        index=batch.index[rows],
        teacher=Outputs(batch.teacher.logits[rows], features, batch.teacher.classifier),
    )


def cases() -> Iterator[tuple[str, Loss, Mapping[str, str]]]:
    for key, loss in LOSSES.items():
        if loss.default_layers or not loss.takes_layers:
            yield key, loss, loss.default_layers
        if loss.takes_layers:
            yield f"{key}-map", loss, MAPS if isinstance(loss, Stateful) else MAP


def distill_step(loss: Loss, layers: Mapping[str, str], batch: Batch) -> DistillStep:
    torch.manual_seed(1)
    student = network(width=3, stride=1)
    with torch.no_grad():
        probe = Probe(student(batch.image), batch, NUM_ROWS + 2)
    return DistillStep(student, {"it": loss.build({}, layers, probe).double()}, {"it": 1.0})


def measure(step: nn.Module, batch: Batch) -> dict[str, Tensor]:
    for _ in range(2):  # the second, so that what remembers has something to remember
        step.zero_grad()
        result = step(batch)
        result.loss.backward()
    gradients = {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in step.named_parameters()
    }
    remembered = {
        name.removeprefix("module."): buffer.clone() for name, buffer in step.named_buffers()
    }
    return {"loss": result.loss.detach().clone(), **gradients, **remembered}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = whole_batch()
    steps = {case: distill_step(loss, layers, batch) for case, loss, layers in cases()}
    measured = {case: {"one": measure(copy.deepcopy(step), batch)} for case, step in steps.items()}
    with joined(rank, folder, measured):
        for case, step in steps.items():
            two = measure(DistributedDataParallel(step), half(batch, rank))
            two["loss"] = mean_over_workers(two["loss"])
            measured[case]["two"] = two


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
