"""How a run's numbers are moved: the optimiser and its learning rate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from pipelines.strict import Strict


class CosineConfig(Strict):
    """Learning rate down a half cosine to ``floor`` times its start, over the run."""

    name: Literal["cosine"] = "cosine"
    floor: NonNegativeFloat = 0.0


class StepsConfig(Strict):
    """Learning rate multiplied by ``gamma`` after each listed epoch; none listed: constant."""

    name: Literal["steps"]
    epochs: tuple[PositiveInt, ...] = ()
    gamma: PositiveFloat = 0.1


class OptimizerConfig(Strict):
    """The optimiser and its learning-rate schedule."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: PositiveFloat = 0.05
    momentum: NonNegativeFloat = 0.9  # sgd
    nesterov: bool = False  # sgd
    weight_decay: NonNegativeFloat = 5e-4
    multipliers: dict[str, PositiveFloat] = {}  # of the learning rate, by layer of the student
    schedule: Annotated[CosineConfig | StepsConfig, Field(discriminator="name")] = CosineConfig()

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> OptimizerConfig:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    @model_serializer(mode="wrap")
    def _without_no_multipliers(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that runs which have none keep the identity they had before there were any."""
        content: dict[str, Any] = whole(self)
        if not self.multipliers:
            del content["multipliers"]
        return content
