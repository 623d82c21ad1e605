"""What a sweep is: a runnable base and the values that its dotted paths take."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from kdcore.checks import unknown_name
from kdcore.losses import LOSSES, Loss
from pipelines.custom_losses import FLAG, is_custom, loss_line
from pipelines.digests import plain
from pipelines.methods import AGREEMENT
from pipelines.ranges import KINDS, Range
from pipelines.runs import Run
from pipelines.strict import Strict, validated

VARIANT, SEED = "variant", "seed"
_GREATER_IS_BETTER = ("val/top1", "val/elbo", AGREEMENT)
_FIXED = ("name", "runs", "caches", "workers", "min_workers", FLAG)
# what must fit pictures, networks and losses
_OF_NETWORKS = (
    *("student", "teacher", "data", "losses", "synthetic", "batch_size"),
    *("model", "mode", "distil", "scratch", "continual"),
)


class SearchConfig(Strict):
    """How a space is searched, and what for."""

    metric: str = "val/top1"  # one of those that the base's kind of run measures
    mode: Literal["max", "min"] = "max"  # as the metric has it
    algorithm: Literal["grid", "random", "optuna"] = "grid"
    num_samples: PositiveInt = 1  # of random and optuna: configurations, each with all its seeds
    minutes: PositiveFloat | None = None  # of wall time, after which no trial is started or goes on
    scheduler: Literal["none", "asha", "median", "pbt"] = "none"  # stops or replaces early
    grace: PositiveInt = 1  # the first epoch at which it may; of pbt a generation's epochs
    max_concurrent: PositiveInt | None = None  # default: what the cores allow
    gpus: PositiveFloat | None = None  # of each trial, perhaps a fraction; default: 1 if any
    seed: NonNegativeInt = 0

    @model_validator(mode="before")
    @classmethod
    def _mode_of_metric(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        better = "max" if value.get("metric", "val/top1") in _GREATER_IS_BETTER else "min"
        if value.setdefault("mode", better) != better:
            raise ValueError(f"mode: {value['metric']} is better the other way: leave mode out")
        return value


class SweepConfig(Strict):
    """A runnable base, named variants of it, and a space over the dotted paths of each.

    A variant is several changes that belong together, such as a loss and its layers, and perhaps
    ranges that only it has. In a point of the space it stands by its name under ``VARIANT``. Every
    point is run with ``seeds`` seeds, from the base's on, and judged by their mean.
    """

    name: str = "sweep"
    base: Run
    variants: dict[str, dict[str, Any]] = {}  # by name: dotted path: value or range
    space: dict[str, Range] = {}
    seeds: PositiveInt = 1
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _searchable(self) -> SweepConfig:
        search = self.search
        if search.metric not in self.base.metrics:
            raise ValueError(
                f"search.metric: {unknown_name('metric', search.metric, self.base.metrics)}"
            )
        for place, paths in {"space": self.space, **self._of_variants}.items():
            fixed = [path for path in paths if path.split(".")[0] in _FIXED]
            if fixed:
                known = ", ".join(_FIXED)
                raise ValueError(f"{place}.{fixed[0]}: {known} are the same for all trials")
            if search.scheduler != "none" and "epochs" in paths:
                raise ValueError(
                    f"{place}.epochs: {search.scheduler} compares trials of one number of epochs"
                )
            if self.seeds > 1 and SEED in paths:
                raise ValueError(f"{place}.seed: is what `seeds` counts; give one of both")
            ranges = {path: held for path, held in paths.items() if isinstance(held, Range)}
            drawn = [path for path, held in ranges.items() if held.kind != "grid"]
            if search.algorithm == "grid" and drawn:
                raise ValueError(
                    f"{place}.{drawn[0]}: algorithm grid takes `grid: [...]` only; "
                    "to draw from ranges set `search: {algorithm: random, num_samples: 20}`"
                )
        if search.algorithm == "grid" and search.num_samples != 1:
            raise ValueError("search.num_samples: a grid runs each point once; give `seeds`")
        return self

    @model_validator(mode="after")
    def _fits_a_population(self) -> SweepConfig:
        search = self.search
        if search.scheduler != "pbt":
            return self
        if self.base.workers > 1 or self.variants:
            raise ValueError("search.scheduler: pbt takes one worker per run, and no variants")
        if search.algorithm != "random" or search.num_samples < 2:
            raise ValueError(
                "search.scheduler: pbt draws its members: set `algorithm: random` and `num_samples`"
            )
        if not self.space or search.grace >= self.base.epochs:
            raise ValueError("search.grace: pbt changes `space` after so many epochs of a run")
        for path, values in self.space.items():
            self._check_schedulable(path, values)
        return self

    def _check_schedulable(self, path: str, values: Range) -> None:
        if values.kind not in ("uniform", "loguniform") or values.given[0] <= 0:
            raise ValueError(
                f"space.{path}: pbt multiplies numbers: give `uniform` or `loguniform` above 0"
            )
        if not (path.startswith("losses.") and self._takes_schedule(path, values.given[0])):
            raise ValueError(
                f"space.{path}: pbt changes weights and parameters of losses that take a schedule, "
                "`losses.*.weight` among them; this is none"
            )

    def _takes_schedule(self, path: str, number: float) -> bool:
        try:
            self.run({path: {"steps": {0: number}}})
        except ValueError:
            return False
        return True

    @model_validator(mode="after")
    def _every_value_is_a_run(self) -> SweepConfig:
        for name in self.variants:
            if not re.fullmatch(r"[\w :/-]+", name):  # MLflow takes no other parameter names
                raise ValueError(f"variants: a name has letters, digits and ' _-:/', not {name!r}")
            try:
                self.run({VARIANT: name})
            except ValueError as error:
                raise ValueError(f"variants.{name} is no run: {error}") from None
        for variant in self.variants or [None]:
            own = self.variants.get(variant, {}) if variant else {}
            for path, values in self.ranges_of(variant).items():
                place = f"variants.{variant}.{path}" if path in own else f"space.{path}"
                for value in values.probes:
                    self._check({path: value} | _named(variant), place, value)
        return self

    def _check(self, point: Mapping[str, Any], place: str, value: Any) -> None:
        try:
            self.run(point)
        except ValueError as error:
            of = f" of variant {point[VARIANT]}" if VARIANT in point else ""
            words = f"{place}: value {value!r} is no run{of}: {error}"
            raise ValueError(words) from None

    @property
    def _of_variants(self) -> dict[str, dict[str, Any]]:
        return {
            f"variants.{name}": {path: _as_range(value) for path, value in changes.items()}
            for name, changes in self.variants.items()
        }

    def ranges_of(self, variant: str | None) -> dict[str, Range]:
        """The dimensions of the space that a variant has: the common ones, and its own."""
        own = self._of_variants[f"variants.{variant}"] if variant else {}
        return self.space | {path: held for path, held in own.items() if isinstance(held, Range)}

    def run(self, point: Mapping[str, Any]) -> Run:
        """The run at a point of the space, which may leave dimensions at the base's values.

        A range of the point's own variant that the point leaves out is at its first value.
        """
        changes = {path: value for path, value in point.items() if path != VARIANT}
        own = self._of_variants[f"variants.{point[VARIANT]}"] if VARIANT in point else {}
        first = {path: held.probes[0] for path, held in own.items() if isinstance(held, Range)}
        return changed(self.base, {**own, **first, **changes})

    def with_seeds(self, point: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The point once for every seed."""
        if self.seeds == 1:
            return [dict(point)]
        return [{**point, SEED: self.base.seed + number} for number in range(self.seeds)]


def _named(variant: str | None) -> dict[str, Any]:
    return {VARIANT: variant} if variant else {}


def _as_range(value: Any) -> Any:
    """A mapping with one key that names a kind of range is that range."""
    is_range = isinstance(value, dict) and len(value) == 1 and next(iter(value)) in KINDS
    return Range.model_validate(value) if is_range else value


def points(config: SweepConfig) -> list[dict[str, Any]]:
    """Every trial of a grid or of a random search, the seeds of one configuration together.

    Trials that are one run, as all losses are at weight 0, are one. Each number of a random search
    is drawn from its own stream, so that another dimension does not change it.
    """
    if config.search.algorithm == "grid":
        drawn: list[dict[str, Any]] = [{}]
    else:
        drawn = [_drawn(config, number) for number in range(config.search.num_samples)]
    found = []
    for sample in drawn:
        for variant in config.variants or [None]:
            if sample.get(VARIANT, variant) != variant:
                continue
            ranges = config.ranges_of(variant)
            grids = {path: held.given for path, held in ranges.items() if held.kind == "grid"}
            kept = {path: value for path, value in sample.items() if path in ranges}
            for values in itertools.product(*grids.values()):
                found.append(_named(variant) | kept | dict(zip(grids, values, strict=True)))
    return distinct(config, [seeded for point in found for seeded in config.with_seeds(point)])


def _drawn(config: SweepConfig, number: int) -> dict[str, Any]:
    """One random configuration, without the dimensions that are grids."""

    def stream(path: str) -> np.random.Generator:
        return np.random.default_rng([config.search.seed, number, zlib.crc32(path.encode())])

    names = list(config.variants)
    sample = _named(names[stream(VARIANT).integers(len(names))] if names else None)
    for path, values in config.ranges_of(sample.get(VARIANT)).items():
        if values.kind != "grid":
            sample[path] = values.draw(stream(path))
    return sample


def neighbours(config: SweepConfig) -> list[Run]:
    """Runs whose networks and losses stand for all trials': what fits them fits the sweep.

    Of a grid every point, seeds apart; else the base and every variant, with one listed value or
    end point at a time.
    """
    if config.search.algorithm == "grid":
        near = [{p: v for p, v in point.items() if p != SEED} for point in points(config)]
    else:
        near = [{}]
        for variant in config.variants or [None]:
            near.append(_named(variant))
            near += [
                {path: value} | _named(variant)
                for path, values in config.ranges_of(variant).items()
                for value in values.probes
                if path.split(".")[0] in _OF_NETWORKS
            ]
    return [config.run(point) for point in distinct(config, near)]


def distinct(config: SweepConfig, points: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points that make different runs: a weight of 0 makes one control of all losses."""
    seen: dict[str, dict[str, Any]] = {}
    for point in points:
        seen.setdefault(config.run(point).identity, dict(point))
    return list(seen.values())


def changed(run: Run, changes: Mapping[str, Any]) -> Run:
    """The run with the values at some dotted paths replaced, validated again.

    Losses are set before their parameters, whatever the order.
    """
    content = plain(run)
    for path in sorted(changes, key=lambda path: not path.endswith(".loss")):
        content = override(content, path, changes[path])
    return validated(type(run), content, where=run.name)


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
    line = _line(value, result) if last == "loss" else None
    if line is not None:
        _fit_to_loss(node, line, before=_line(node.get("loss"), result))
    node[_place(node, last)] = deepcopy(value)
    return result


def _has_place(node: Any, key: str) -> bool:
    return isinstance(node, list) and key.isdecimal() and int(key) < len(node)


def _place(node: Any, key: str) -> str | int:
    return int(key) if isinstance(node, list) else key


def _line(loss: Any, run: Mapping[str, Any]) -> Loss | None:
    """The line of a loss, if it is one that the run may name."""
    if not isinstance(loss, str):
        return None
    if loss in LOSSES:
        return LOSSES[loss]
    return loss_line(loss) if run.get(FLAG) is True and is_custom(loss) else None


def _fit_to_loss(term: dict[str, Any], line: Loss, *, before: Loss | None) -> None:
    """Leave out of a term what the new loss does not take, and what was the old one's default."""
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
