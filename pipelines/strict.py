"""Values that refuse what they do not know, and the one line that says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kdcore.checks import unknown_name

Config = TypeVar("Config", bound="Strict")


class Strict(BaseModel):
    """A value that refuses keys it does not know, naming the nearest, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key in value:
                if key not in cls.model_fields:
                    raise ValueError(unknown_name("key", str(key), cls.model_fields))
        return value


def validated(kind: type[Config], content: Mapping[str, Any], *, where: str) -> Config:
    """The content as a configuration; ValueError names the place, the found and the expected."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{where}: " + "; ".join(problems(error, ()))) from None


def problems(error: ValidationError, above: tuple[str, ...]) -> list[str]:
    """Each problem with its path below ``above``."""
    return [_explained(problem, above) for problem in error.errors()]


def _explained(problem: Any, above: tuple[str, ...]) -> str:
    # a part in brackets is which of several kinds a value was taken for
    parts = [str(part) for part in problem["loc"] if not str(part).startswith("(")]
    path = (*above, *parts)
    place = f"{'.'.join(path)}: " if path else ""
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ValueError):
        return f"{place}{cause}"
    if problem["type"] == "missing":
        return f"{'.'.join(path)} is missing"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{place}{message}, got {problem['input']!r}"
