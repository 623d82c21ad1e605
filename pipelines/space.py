"""What a sweep is: a runnable base and the values that its dotted paths take."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from kdcore.losses import LOSSES
from pipelines.config import RunConfig, plain
from pipelines.strict import Strict, validated

VARIANT = "variant"
_FIXED = ("name", "runs", "caches", "workers")
# what must fit pictures, networks and losses
_OF_NETWORKS = (VARIANT, "student", "teacher", "data", "losses", "batch_size")


class SearchConfig(Strict):
    """How a space is searched, and what for."""

    metric: Literal["val/top1", "val/nll", "val/calibration_error"] = "val/top1"
    mode: Literal["max", "min"] = "max"
    algorithm: Literal["grid", "random", "optuna"] = "grid"
    num_samples: PositiveInt = 1  # random and optuna
    scheduler: Literal["none", "asha"] = "none"
    max_concurrent: PositiveInt | None = None  # default: what the cores allow
    seed: NonNegativeInt = 0


class Range(Strict):
    """The values that one dotted path takes: exactly one of these keys."""

    grid: list[Any] | None = None
    choice: list[Any] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    randint: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _one(self) -> Range:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of grid, choice, uniform, loguniform, randint: {given}")
        values = getattr(self, given[0])
        if len(values) == 0:
            raise ValueError(f"{given[0]}: expected at least one value")
        if given[0] not in ("grid", "choice") and values[0] >= values[1]:
            raise ValueError(f"{given[0]}: expected [low, high] with low < high, got {values}")
        return self

    @property
    def kind(self) -> str:
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def probes(self) -> list[Any]:
        """Every listed value; of a range both end points and, if it is continuous, one between."""
        values = getattr(self, self.kind)
        if self.kind == "randint":
            return [values[0], values[1] - 1]
        if self.kind in ("uniform", "loguniform"):
            low, high = values
            return [low, low + (high - low) / math.pi, high]
        return list(values)


class SweepConfig(Strict):
    """A runnable base, named variants of it, and a space over the dotted paths of each.

    A variant is several changes that belong together, such as a loss and its layers. In a point of
    the space it stands by its name under ``VARIANT``.
    """

    name: str = "sweep"
    base: RunConfig
    variants: dict[str, dict[str, Any]] = {}  # by name: dotted path: value
    space: dict[str, Range] = {}
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _every_value_is_a_run(self) -> SweepConfig:
        fixed = [path for path in self.space if path.split(".")[0] in _FIXED]
        if fixed:
            raise ValueError(f"space.{fixed[0]}: {', '.join(_FIXED)} are the same for all trials")
        if self.search.scheduler == "asha" and "epochs" in self.space:
            raise ValueError("space.epochs: asha compares trials of the same number of epochs")
        if self.search.algorithm == "grid" and self.search.num_samples != 1:
            raise ValueError("search.num_samples: a grid runs each point once; add seeds to it")
        if self.search.algorithm == "grid":
            drawn = [path for path, values in self.space.items() if values.kind != "grid"]
            if drawn:
                raise ValueError(f"space.{drawn[0]}: algorithm grid takes `grid: [...]` only")
        for name, changes in self.variants.items():
            if not re.fullmatch(r"[\w :/-]+", name):  # MLflow takes no other parameter names
                raise ValueError(f"variants: a name has letters, digits and ' _-:/', not {name!r}")
            fixed = [path for path in changes if path.split(".")[0] in _FIXED]
            if fixed:
                raise ValueError(f"variants.{name}.{fixed[0]}: is the same for all trials")
            try:
                changed(self.base, changes)
            except ValueError as error:
                raise ValueError(f"variants.{name} is no run: {error}") from None
        for path, values in self.space.items():
            for value, variant in itertools.product(values.probes, self.variants or [None]):
                try:
                    self.run({path: value} | ({VARIANT: variant} if variant else {}))
                except ValueError as error:
                    of = f" of variant {variant}" if variant else ""
                    words = f"space.{path}: value {value!r} is no run{of}: {error}"
                    raise ValueError(words) from None
        return self

    @property
    def whole_space(self) -> dict[str, Range]:
        """The space with the variants as one more dimension."""
        named = {VARIANT: Range(grid=list(self.variants))} if self.variants else {}
        return named | self.space

    def run(self, point: Mapping[str, Any]) -> RunConfig:
        """The run at a point of the space, which may leave dimensions at the base's values."""
        changes = {path: value for path, value in point.items() if path != VARIANT}
        variant = self.variants[point[VARIANT]] if VARIANT in point else {}
        return changed(self.base, {**variant, **changes})


def neighbours(config: SweepConfig) -> list[RunConfig]:
    """Runs whose networks and losses stand for all trials': what fits them fits the sweep.

    Of a grid every point, seeds apart; else the base, with one listed value or end point at a time.
    """
    if config.search.algorithm == "grid":
        space = {path: values for path, values in config.whole_space.items() if path != "seed"}
        return [config.run(point) for point in distinct(config, grid_points(space))]
    return [
        config.base,
        *(
            config.run({path: value})
            for path, values in config.whole_space.items()
            for value in values.probes
            if path.split(".")[0] in _OF_NETWORKS
        ),
    ]


def grid_points(space: Mapping[str, Range]) -> list[dict[str, Any]]:
    """Every combination of the listed values, as changes by dotted path."""
    values = [space[path].probes for path in space]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]


def distinct(config: SweepConfig, points: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points that make different runs: a weight of 0 makes one control of all losses."""
    seen: dict[str, dict[str, Any]] = {}
    for point in points:
        seen.setdefault(config.run(point).identity, dict(point))
    return list(seen.values())


def changed(run: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The run with the values at some dotted paths replaced, validated again.

    Losses are set before their parameters, whatever the order.
    """
    content = plain(run)
    for path in sorted(changes, key=lambda path: not path.endswith(".loss")):
        content = override(content, path, changes[path])
    return validated(RunConfig, content, where=run.name)


def override(content: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of nested mappings with the value at a dotted path replaced.

    A number in the path is a place in a list, which must be there. Setting a term's ``loss`` drops
    the ``params`` and ``layers`` that belonged to the former one, unless the new loss knows them.
    """
    result = deepcopy(dict(content))
    node: Any = result
    keys = path.split(".")
    for depth, (key, below) in enumerate(itertools.pairwise(keys), start=1):
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[_place(node, key)]
        if not isinstance(node, dict) and not _has_place(node, below):
            above = ".".join(keys[:depth])
            raise ValueError(f"cannot set {path}: {above} is {node!r}, not a mapping")
    last = keys[-1]
    if last == "loss" and isinstance(value, str) and value in LOSSES:
        _fit_to_loss(node, value)
    node[_place(node, last)] = deepcopy(value)
    return result


def _has_place(node: Any, key: str) -> bool:
    return isinstance(node, list) and key.isdecimal() and int(key) < len(node)


def _place(node: Any, key: str) -> str | int:
    return int(key) if isinstance(node, list) else key


def _fit_to_loss(term: dict[str, Any], loss: str) -> None:
    """Leave out of a term what the new loss does not take, and what was the old one's default."""
    line, before = LOSSES[loss], LOSSES.get(term.get("loss", ""))
    defaults = (
        {name: held.default for name, held in before.hyperparameters.items()} if before else {}
    )
    if isinstance(term.get("params"), dict):
        term["params"] = {
            name: held
            for name, held in term["params"].items()
            if name in line.hyperparameters and (name not in defaults or held != defaults[name])
        }
    if not line.takes_layers or (before and term.get("layers") == before.default_layers):
        term["layers"] = {}
    if not line.needs_teacher:
        term.pop("teacher", None)
    if before and term.get("weight") == before.weight:
        term["weight"] = line.weight
