"""Numbers that change over a run, as functions of the epochs trained so far."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass


class Schedule(ABC):
    """A weight or a hyper-parameter over the run: ``schedule(epoch) -> value``."""

    @abstractmethod
    def __call__(self, epoch: float) -> float:
        """The value after ``epoch`` epochs, which need not be whole."""


@dataclass(frozen=True)
class Warmup(Schedule):
    """From 0 in a straight line to ``value`` after ``epochs``, then constant."""

    value: float
    epochs: float

    def __call__(self, epoch: float) -> float:
        return self.value * min(epoch / self.epochs, 1.0)


@dataclass(frozen=True)
class Cosine(Schedule):
    """From ``start`` to ``end`` along half a cosine over ``epochs``."""

    start: float
    end: float
    epochs: float

    def __call__(self, epoch: float) -> float:
        done = min(epoch / self.epochs, 1.0)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Steps(Schedule):
    """The value of the last listed epoch that has been reached; one is listed for epoch 0."""

    values: Mapping[int, float]

    def __call__(self, epoch: float) -> float:
        return self.values[max(start for start in self.values if start <= epoch)]


def at(value: object, epoch: float) -> object:
    """A schedule's value after ``epoch`` epochs; anything else as it is."""
    return value(epoch) if isinstance(value, Schedule) else value
