"""YAML files to runs and sweeps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pipelines.config import RunConfig, validated
from pipelines.space import SweepConfig, override


def load(path: Path, changes: Iterable[str] = ()) -> RunConfig | SweepConfig:
    """A run or sweep from YAML, with ``dotted.path=value`` changes applied to it.

    Paths to other configurations (``base``, ``teacher.run``) are relative to the file; all other
    paths are relative to the working directory. In a sweep, a change applies to the sweep if its
    first key is one of the sweep's, and to its base run otherwise.

    Raises ValueError that names the file, the key, what was found and what was expected.
    """
    content = _read(path)
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator:
            raise ValueError(f"--set expects dotted.path=value, got {change!r}")
        in_base = "base" in content and key.split(".")[0] not in SweepConfig.model_fields
        content = override(content, f"base.{key}" if in_base else key, _value(change, text))
    if "base" in content:
        return validated(SweepConfig, content, where=str(path))
    return validated(RunConfig, content, where=str(path))


def _value(change: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {change}: the value is not YAML: {error}") from None


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in above:
        raise ValueError(f"{path} names itself, by way of {' and '.join(map(str, above))}")
    above = (*above, path.resolve())
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no configuration at {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of keys, got {type(content).__name__}")
    content.setdefault("name", path.stem)
    if isinstance(content.get("base"), str):
        content["base"] = _read(path.parent / content["base"], above)
    teacher = content.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("run"), str):
        content["teacher"] = {**teacher, "run": _read(path.parent / teacher["run"], above)}
    return content
