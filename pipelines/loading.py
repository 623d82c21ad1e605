"""YAML files to runs and sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.runs import Run, kind_of
from pipelines.space import SweepConfig, override
from pipelines.strict import validated
from pipelines.transfer import TransferConfig


def load(path: Path, changes: Iterable[str] = ()) -> Run | SweepConfig:
    """A run or sweep from YAML, with ``dotted.path=value`` changes applied to it.

    Paths to other configurations (``base``, ``teacher.run``) are relative to the file that names
    them; those of changes and all other paths are relative to the working directory. In a sweep, a
    change applies to the sweep if its first key is one of the sweep's, and to its base otherwise.

    Raises ValueError that names the file, the key, what was found and what was expected.
    """
    content = _read(path)
    for change in changes:
        key, value = _split(change)
        in_base = "base" in content and key.split(".")[0] not in SweepConfig.model_fields
        content = override(content, f"base.{key}" if in_base else key, value)
    content = _with_files(content, Path())
    if "base" in content:
        return validated(SweepConfig, content, where=str(path))
    return validated(kind_of(content), content, where=str(path))


def load_transfer(path: Path, changes: Iterable[str] = ()) -> TransferConfig:
    """A transfer set from YAML, with changes and paths as of a run. Raises ValueError like it."""
    content = _read(path)
    for change in changes:
        key, value = _split(change)
        content = override(content, key, value)
    return validated(TransferConfig, _with_files(content, Path()), where=str(path))


def as_yaml(content: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    return yaml.safe_dump(dict(content), sort_keys=False)


def _split(change: str) -> tuple[str, Any]:
    key, separator, text = change.partition("=")
    if not separator:
        raise ValueError(f"--set expects dotted.path=value, got {change!r}")
    try:
        return key, yaml.load(text, _Unambiguous)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {change}: the value is not YAML: {error}") from None


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in above:
        raise ValueError(f"{path} names itself, by way of {' and '.join(map(str, above))}")
    try:
        content = yaml.load(path.read_text(), _Unambiguous)
    except OSError as error:
        raise ValueError(f"no configuration at {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of keys, got {type(content).__name__}")
    content.setdefault("name", path.stem)
    return _with_files(content, path.parent, (*above, path.resolve()))


def _with_files(
    content: dict[str, Any], folder: Path, above: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """The content with the configurations that it names by path in their places."""
    result = dict(content)
    if isinstance(result.get("base"), str):
        result["base"] = _read(folder / result["base"], above)
    elif isinstance(result.get("base"), dict):
        result["base"] = _with_files(result["base"], folder, above)
    teacher = result.get("teacher")
    if isinstance(teacher, list):
        result["teacher"] = [_with_run(one, folder, above) for one in teacher]
    elif teacher is not None:
        result["teacher"] = _with_run(teacher, folder, above)
    return result


def _with_run(teacher: Any, folder: Path, above: tuple[Path, ...]) -> Any:
    if isinstance(teacher, dict) and isinstance(teacher.get("run"), str):
        return {**teacher, "run": _read(folder / teacher["run"], above)}
    return teacher


class _Unambiguous(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which the standard keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)
