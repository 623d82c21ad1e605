"""The two kinds of run, told apart by the top level: ``model``, or ``student``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from pipelines.config import RunConfig
from pipelines.generative.config import GenerativeConfig


def _kind(value: Any) -> str:
    is_generative = "model" in value if isinstance(value, dict) else hasattr(value, "model")
    return "(model)" if is_generative else "(student)"


Run = Annotated[
    Annotated[GenerativeConfig, Tag("(model)")] | Annotated[RunConfig, Tag("(student)")],
    Discriminator(_kind),
]


def kind_of(content: Mapping[str, Any]) -> type[GenerativeConfig] | type[RunConfig]:
    """Which kind of run a file describes."""
    return GenerativeConfig if "model" in content else RunConfig


def run_of(content: Mapping[str, Any]) -> GenerativeConfig | RunConfig:
    """The run that ``plain`` made this of."""
    return kind_of(content).model_validate(content)
