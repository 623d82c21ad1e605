"""Which networks a run may name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from kdcore.checks import unknown_name
from kdcore.kdiffusion.branches import Scale
from kdcore.kdiffusion.kinds import Kind
from kdcore.models import MODELS
from pipelines.strict import Strict

# the literature's ResNets of four stages for small pictures: torchvision's, with a small stem
SMALL_RESNETS: Mapping[str, str] = {
    f"resnet{depth}_small": f"torchvision/resnet{depth}" for depth in (18, 34, 50)
}


class ModelConfig(Strict):
    """A network by name: ours, ``timm/<name>``, ``torchvision/<name>`` or ``resnet18_small``."""

    name: str
    weights: Path | None = None  # .safetensors, or a .pth that holds a plain state dict
    params: dict[str, Any] = {}  # further arguments of the network's own constructor
    stem: Literal["original", "small"] = "original"  # small: 3x3 stride 1, no max-pool

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = {*MODELS, *SMALL_RESNETS}
        if "/" not in name and name not in known:
            raise ValueError(
                unknown_name("network", name, known) + "; others are timm/<name>, "
                "torchvision/<name>"
            )
        if "/" in name and name.split("/")[0] not in ("timm", "torchvision"):
            raise ValueError(f"expected timm/<name> or torchvision/<name>, got {name!r}")
        return name


class BranchesConfig(Strict):
    """Branches in the place of the last layer of some stages, fused into one layer afterwards.

    Their outputs are the student's layer ``STAGE.branches``.
    """

    stages: tuple[str, ...] = Field(min_length=1)
    count: PositiveInt = 8
    kinds: tuple[Kind, ...] = ("same",)
    scale: Scale = "gamma"
    batch_norm: bool = False  # of every branch, where none follows the layer


class JoinConfig(Strict):
    """A map of the student and one of a teacher, whose shape the student takes up."""

    layer: str
    teacher_layer: str
    teacher: str | None = None  # its label, where there are several


class ReuseConfig(JoinConfig):
    """The teacher's classifier behind a bottleneck, which is the student's layer ``projector``."""

    reduction: PositiveInt = 2  # of the channels inside the bottleneck


class ExpandConfig(JoinConfig):
    """A linear detour over copies of the teacher's channels, the student's layer ``expand``."""

    copies: PositiveInt = 8


class QuantiseConfig(Strict):
    """Weights and inputs of every convolution and linear layer in so few bits, trained as such."""

    bits: int = Field(default=8, ge=2, le=8)


class StudentConfig(ModelConfig):
    """A network, and the form in which it is trained if that is another one."""

    branches: BranchesConfig | None = None
    reuse: ReuseConfig | None = None
    expand: ExpandConfig | None = None
    quantise: QuantiseConfig | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is trained as it is."""
        return all(getattr(self, name) is None for name in _FORMS)

    @property
    def joins(self) -> Mapping[str, JoinConfig]:
        """By name the form that takes up a teacher's shapes, if the student has one."""
        return {
            name: held for name in _FORMS if isinstance(held := getattr(self, name), JoinConfig)
        }

    @model_validator(mode="after")
    def _one_form(self) -> StudentConfig:
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"expected one of {', '.join(_FORMS)} at most, got {given}")
        return self

    @model_serializer(mode="wrap")
    def _without_forms_not_taken(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that a new form changes the identity of no run that does not take it."""
        content: dict[str, Any] = whole(self)
        return {
            name: held for name, held in content.items() if name not in _FORMS or held is not None
        }


_FORMS = ("branches", "reuse", "expand", "quantise")
