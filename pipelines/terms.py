"""One weighted loss of a run: what YAML may say of it, and the schedules of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import (
    Discriminator,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Tag,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from kdcore.losses import Stateful
from kdcore.pooling import split_pooling
from kdcore.schedules import Cosine, Schedule, Steps, Warmup
from pipelines.custom_losses import loss_line
from pipelines.strict import Strict, problems


class ScheduleConfig(Strict):
    """A number over the run: exactly one of ``warmup``, ``cosine`` and ``steps``."""

    warmup: PositiveFloat | None = None  # epochs in which it grows from 0 to `to`
    to: float = 1.0
    cosine: tuple[float, float] | None = None  # from and to, over the whole run
    steps: dict[NonNegativeInt, float] | None = None  # from an epoch on: the value

    @model_validator(mode="after")
    def _one(self) -> ScheduleConfig:
        kinds = ("warmup", "cosine", "steps")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of {', '.join(kinds)}, got {given}")
        if self.steps is not None and 0 not in self.steps:
            raise ValueError("steps: expected a value for epoch 0")
        return self

    def over(self, epochs: int) -> Schedule:
        """The schedule of a run of so many epochs."""
        if self.warmup is not None:
            return Warmup(self.to, self.warmup)
        if self.cosine is not None:
            return Cosine(*self.cosine, float(epochs))
        return Steps(self.steps or {})

    @property
    def extremes(self) -> list[float]:
        return [0.0, self.to] if self.warmup else [*(self.cosine or (self.steps or {}).values())]


def _kind(value: Any) -> str:
    return "(schedule)" if isinstance(value, dict | ScheduleConfig) else "(number)"


Scheduled = Annotated[ScheduleConfig, Tag("(schedule)")]
Number = Annotated[Annotated[float, Tag("(number)")] | Scheduled, Discriminator(_kind)]
Weight = Annotated[Annotated[NonNegativeFloat, Tag("(number)")] | Scheduled, Discriminator(_kind)]


class LossConfig(Strict):
    """One weighted term: ``loss`` names a line of LOSSES, and its label does where it is absent.

    Or it is ``module:attr``, which is then imported: the run refuses it first if it is not allowed.
    """

    loss: str
    weight: Weight  # the literature's where it is absent
    params: dict[str, Any] = {}
    layers: dict[str, str] = {}  # student layer: teacher layer
    teacher: str | None = None  # its label; without it the only one, or the average of several

    @model_validator(mode="before")
    @classmethod
    def _defaults_filled(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("loss"), str):
            return value
        loss = value["loss"]
        line = loss_line(loss)
        if value.get("layers") and not line.takes_layers:
            raise ValueError(f"loss {loss!r} compares logits and takes no `layers`")
        if value.get("teacher") is not None and not line.needs_teacher:
            raise ValueError(f"loss {loss!r} listens to no teacher and takes no `teacher`")
        if line.takes_layers and not (value.get("layers") or line.default_layers):
            raise ValueError(
                f"loss {loss!r} needs `layers`: student layer: teacher layer, such as "
                "{layer2: layer2}"
            )
        params = _checked_params(loss, value.get("params", {}))
        layers = value.get("layers") or line.default_layers
        if isinstance(layers, Mapping):  # sorted: the file's order is not part of the identity
            layers = dict(sorted(layers.items()))
        weight = value.get("weight", line.weight)
        if isinstance(weight, dict) and "warmup" in weight:
            weight = {"to": line.weight, **weight}
        _check_attention_power(params, layers)
        return {**value, "weight": weight, "params": params, "layers": layers}

    @field_validator("weight")
    @classmethod
    def _never_negative(cls, weight: float | ScheduleConfig) -> float | ScheduleConfig:
        if isinstance(weight, ScheduleConfig) and min(weight.extremes) < 0:
            raise ValueError("a weight is never below 0")
        return weight

    @property
    def is_on(self) -> bool:
        """Whether the term ever has a weight."""
        weight = self.weight
        return max(weight.extremes) > 0 if isinstance(weight, ScheduleConfig) else weight > 0


def _check_attention_power(params: Mapping[str, Any], layers: Any) -> None:
    """The pooling ``at`` keeps the attention of power 2, from which no other can be made."""
    named = [name for pair in dict(layers or {}).items() for name in map(str, pair)]
    pooled = [name for name in named if split_pooling(name)[1] == "at"]
    if pooled and params.get("power", 2) != 2:
        raise ValueError(
            f"layers: {pooled[0]!r} keeps the attention of power 2 only, and params.power is "
            f"{params['power']}; name the layer without '@at'"
        )


def _checked_params(loss: str, params: Any) -> dict[str, Any]:
    try:
        return hyperparameters(loss).model_validate(params).model_dump()
    except ValidationError as error:
        raise ValueError("; ".join(problems(error, ("params",)))) from None


@cache
def hyperparameters(loss: str) -> type[Strict]:
    """The schema of a loss's ``params``, read from its function's signature.

    A real number of a function may be a schedule; what a term learns with is fixed.
    """
    line = loss_line(loss)

    def kind(annotation: Any) -> Any:
        may_change = annotation is float and not isinstance(line, Stateful)
        return Number if may_change else annotation

    fields: dict[str, Any] = {
        name: (kind(parameter.annotation), parameter.default)
        for name, parameter in line.hyperparameters.items()
    }
    return create_model(f"{loss}.params", __base__=Strict, **fields)
