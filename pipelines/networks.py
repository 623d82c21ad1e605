"""Which networks a run may name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from kdcore.checks import unknown_name
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
