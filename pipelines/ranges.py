"""The values that one dotted path of a sweep takes, and how they are drawn."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveFloat, model_validator

from pipelines.strict import Strict

Number = Annotated[float, Field(allow_inf_nan=False)]


class Range(Strict):
    """Exactly one of these keys."""

    grid: list[Any] | None = None  # every value
    choice: list[Any] | None = None  # one of them at a time
    uniform: tuple[Number, Number] | None = None  # low and high
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    quniform: tuple[Number, Number, PositiveFloat] | None = None  # low, high, multiples of
    randint: tuple[int, int] | None = None  # low, and high which is not drawn
    normal: tuple[Number, PositiveFloat] | None = None  # mean, standard deviation

    @model_validator(mode="after")
    def _one(self) -> Range:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of {', '.join(KINDS)}: {given}")
        values = getattr(self, given[0])
        if len(values) == 0:
            raise ValueError(f"{given[0]}: expected at least one value")
        if given[0] not in (*LISTED, "normal") and values[0] >= values[1]:
            raise ValueError(f"{given[0]}: expected [low, high] with low < high, got {values}")
        if self.quniform is not None and not self.multiples:
            raise ValueError(
                f"quniform: no multiple of {values[2]:g} in [{values[0]}, {values[1]}]"
            )
        return self

    @property
    def kind(self) -> str:
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def given(self) -> Any:
        """What stands behind the key."""
        return getattr(self, self.kind)

    @property
    def multiples(self) -> list[float]:
        """Of the step of ``quniform``, between its ends."""
        low, high, step = self.quniform or (0.0, 0.0, 1.0)
        numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        return [round(number * step, 12) for number in numbers]

    @property
    def probes(self) -> list[Any]:
        """Every listed value; of a range both ends and, if it is continuous, one between.

        The ends of ``normal`` are three standard deviations from its mean.
        """
        if self.kind == "randint":
            return [self.given[0], self.given[1] - 1]
        if self.kind == "quniform":
            return [self.multiples[0], self.multiples[-1]]
        if self.kind == "normal":
            mean, deviation = self.given
            return [mean - 3 * deviation, mean, mean + 3 * deviation]
        if self.kind in ("uniform", "loguniform"):
            low, high = self.given
            return [low, low + (high - low) / math.pi, high]
        return list(self.given)

    def draw(self, random: np.random.Generator) -> Any:
        """One value at random; of ``normal`` within three standard deviations."""
        if self.kind in LISTED:
            return self.given[random.integers(len(self.given))]
        if self.kind == "quniform":
            return self.multiples[random.integers(len(self.multiples))]
        if self.kind == "normal":
            mean, deviation = self.given
            while abs(number := random.standard_normal()) > 3:
                pass
            return float(mean + deviation * number)
        low, high = self.given
        if self.kind == "randint":
            return int(random.integers(low, high))
        if self.kind == "loguniform":
            return float(math.exp(random.uniform(math.log(low), math.log(high))))
        return float(random.uniform(low, high))


KINDS = tuple(Range.model_fields)
LISTED = ("grid", "choice")
