"""One of two gloo workers: online data-free methods under DDP beside one process.

Usage: python datafree_workers.py RANK FOLDER, as ``gloo.py`` calls it. What is measured of a method
is all that two epochs have made of student and synthesizer.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdcore.datafree.batches import SyntheticBatches
from kdcore.datafree.learning import published_step
from kdcore.datafree.plans import Alternation, Method, Weighted
from kdcore.datafree.synthesis import Synthesizer
from kdcore.taps import Tapped
from tests.gloo import NUM_WORKERS, joined
from tests.kdcore.datafree_toys import (
    BATCH,
    LAYERS,
    NORMALISATION,
    NUM_CLASSES,
    SHAPE,
    toy,
    trained_teacher,
)

ONLINE = ("adaptive_deepinversion", "dafl", "zskt", "dfq", "cmi", "fast")


def student() -> Tapped:
    """No BatchNorm, whose statistics each worker has alone."""
    torch.manual_seed(1)
    net = nn.Sequential(
        OrderedDict(
            block1=nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh()),
            block2=nn.Sequential(nn.Conv2d(3, 3, 3, 2, padding=1), nn.Tanh()),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(3, NUM_CLASSES),
        )
    )
    return Tapped(net, LAYERS).double()


def small(name: str) -> Method:
    """Even smaller than the toy: two rounds in an epoch of those that alternate."""
    method = toy(name)
    if isinstance(method.schedule, Alternation):
        return replace(method, schedule=replace(method.schedule, rounds=2))
    return method


def cases() -> Iterator[tuple[str, Method]]:
    """Every online preset; of some what else they can be."""
    yield from ((name, small(name)) for name in ONLINE)
    dafl, dfq, fast, inverted = (
        small(name) for name in ("dafl", "dfq", "fast", "adaptive_deepinversion")
    )
    yield "dfq-ensemble", replace(dfq, images=replace(dfq.images, count=2))
    yield "fast-reptile", replace(fast, images=replace(fast.images, kind="reptile"))
    replayed = replace(dafl.schedule, replay=True, student_steps=2)
    yield "dafl-replay", replace(dafl, schedule=replayed, pool_limit=2 * BATCH)
    norms = {name: Weighted(weight=0.01) for name in ("tv_l2", "length", "mean_length")}
    stretched = replace(inverted.images, bounds="stretch")
    yield (
        "inversion-norms",
        replace(inverted, images=stretched, priors={**inverted.priors, **norms}),
    )


def trained(method: Method, *, workers: int) -> dict[str, Tensor]:
    """Student and synthesizer after two epochs."""
    teacher, learner = trained_teacher().double(), student()
    synthesizer = Synthesizer(
        teacher, method, shape=SHAPE, normalisation=NORMALISATION, students=[learner], seed=3
    )
    batches = SyntheticBatches(synthesizer)
    step = published_step(method, learner, teacher, shape=SHAPE, layers=LAYERS)
    module = DistributedDataParallel(step) if workers > 1 else step
    optimizer = torch.optim.SGD(step.parameters(), 0.05)
    for epoch in range(2):
        for batch in batches.epoch(epoch):
            optimizer.zero_grad()
            module(batch).loss.backward()
            optimizer.step()
    # of the rounds what all workers together have measured; a state has each one's own sums
    made = batches.state_dict() | {"rounds": batches.rounds.metrics}
    return dict(flat(made, "made")) | dict(flat(learner.state_dict(), "student"))


def flat(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The numbers of nested states; the latents, which each worker has for itself, are no state."""
    if isinstance(state, Mapping):
        for key, held in state.items():
            yield from flat(held, f"{name}.{key}")
    elif isinstance(state, list):
        for place, held in enumerate(state):
            yield from flat(held, f"{name}.{place}")
    elif isinstance(state, Tensor | int | float):
        yield name, torch.as_tensor(state).double()


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    alone = cases() if rank == 0 else ()
    measured = {name: {"one": trained(method, workers=1)} for name, method in alone}
    with joined(rank, folder, measured):
        for name, method in cases():
            two = trained(method, workers=NUM_WORKERS)
            measured.setdefault(name, {})["two"] = two


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
