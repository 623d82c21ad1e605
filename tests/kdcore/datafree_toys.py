"""A teacher of four patterns and every preset at the size of a test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore.datafree.images import Normalisation
from kdcore.datafree.plans import (
    Adapted,
    Alternation,
    EveryEpoch,
    Generators,
    Method,
    Offline,
)
from kdcore.datafree.presets import PRESETS
from kdcore.datafree.targets import Records, measure_records
from kdcore.models import convnet
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.teachers import freeze, taught
from kdcore.types import Batch

SHAPE = (1, 8, 8)
NUM_CLASSES = 4
BATCH = 32
NORMALISATION = Normalisation((0.5,), (0.25,))
LAYERS = {"block1": "block1", "block2": "block2"}


def patterns(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A bright quarter of a grey, noisy picture says the class."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % NUM_CLASSES
    image = 0.4 + 0.1 * torch.randn(count, *SHAPE, generator=generator)
    for row, number in enumerate(label.tolist()):
        top, left = divmod(number, 2)
        image[row, :, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4] += 0.4
    return NORMALISATION.to_network(image.clamp(0, 1)), label


@cache
def _trained() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = convnet(NUM_CLASSES, 1, width=4)
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        image, label = patterns(128, seed=0)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(net(image), label).backward()
            optimizer.step()
    return net.state_dict()


def trained_teacher(layers: Iterable[str] = LAYERS) -> Tapped:
    net = convnet(NUM_CLASSES, 1, width=4)
    net.load_state_dict(_trained())
    return freeze(Tapped(net, layers))


def new_student() -> Tapped:
    return Tapped(convnet(NUM_CLASSES, 1, width=3), LAYERS)


def real_records(teacher: Tapped) -> Records:
    image, label = patterns(64, seed=1)
    return measure_records(teacher, [Batch(image, label, torch.arange(64))], NUM_CLASSES)


def accuracy(net: Tapped) -> float:
    image, label = patterns(200, seed=2)
    training = net.training
    with torch.no_grad():
        right = (net.eval()(image).logits.argmax(dim=1) == label).float().mean()
    net.train(training)
    return float(right)


def toy(name: str) -> Method:
    """The preset with few pictures, few steps and a thin generator; its priors as they are."""
    method = PRESETS[name]
    priors = {key: replace(one, after=min(one.after, 1)) for key, one in method.priors.items()}
    return replace(
        method,
        images=_thin(method.images),
        schedule=_short(method.schedule),
        priors=priors,
    )


def _thin(images: Any) -> Any:
    if not isinstance(images, Generators | Adapted):
        return images
    images = replace(images, network=replace(images.network, latent=8, width=4))
    if isinstance(images, Generators) and images.annealed_over is not None:
        return replace(images, annealed_over=12)
    return images


def _short(schedule: Offline | EveryEpoch | Alternation) -> Offline | EveryEpoch | Alternation:
    if isinstance(schedule, Offline):
        return replace(schedule, batch_size=BATCH, steps=min(schedule.steps, 20))
    if isinstance(schedule, EveryEpoch):
        small = replace(schedule, batch_size=BATCH, steps=min(schedule.steps, 5), warmup=1)
        return replace(small, student_steps=4, student_batch_size=BATCH)
    small = replace(schedule, batch_size=BATCH, rounds=3, warmup=min(schedule.warmup, 2))
    return replace(small, student_steps=min(schedule.student_steps, 4))


def learn(step: DistillStep, batches: Iterable[Batch], *, lr: float = 0.02) -> list[float]:
    """Train the step on the batches; the losses."""
    optimizer = torch.optim.Adam(step.parameters(), lr)
    losses = []
    for batch in batches:
        result = step.train()(batch)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(float(result.loss.detach()))
    return losses


def stored_batches(image: Tensor, label: Tensor, teacher: Tapped) -> Iterator[Batch]:
    """A transfer set as batches."""
    parts = zip(image.split(BATCH), label.split(BATCH), strict=True)
    rows = (
        Batch(NORMALISATION.loaded(pixels, torch.float32), said, torch.arange(len(said)))
        for pixels, said in parts
    )
    yield from taught(rows, teacher)


def digest(net: nn.Module) -> str:
    content = hashlib.sha256()
    for name, held in sorted(net.state_dict().items()):
        content.update(name.encode() + held.numpy().tobytes())
    return content.hexdigest()
