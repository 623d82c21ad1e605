"""Data-free methods in YAML: a preset and what is changed of it; a run that takes one for data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    Field,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from kdcore.checks import unknown_name
from kdcore.datafree.plans import EveryEpoch, Method, Offline, Weighted
from kdcore.datafree.presets import PRESETS
from kdcore.datafree.priors import PRIORS, check_priors
from kdcore.datafree.targets import LOGITS
from pipelines.strict import Strict, problems

AGREEMENT = "synthetic/agreement"  # with the teacher, on synthetic pictures: it needs no label
# What a number may be, by its name: kdcore's types say only its kind. Without steps, pictures are
# as they begin, which is what the method `noise` is.
_ABOVE_0 = (
    *("batch_size", "student_batch_size", "student_steps", "rounds", "count", "annealed_over"),
    *("latent", "width", "bank", "num_negatives", "pool_limit"),
    *("lr", "clip_norm", "temperature", "deviation"),
)
_FROM_0 = ("steps", "warmup", "after", "weight", "latent_lr", "meta_lr", "roll", "crop")
_BOUNDS = {**dict.fromkeys(_ABOVE_0, Field(gt=0)), **dict.fromkeys(_FROM_0, Field(ge=0))}


class SyntheticConfig(Strict):
    """Pictures that are made from a teacher while the student learns, instead of real ones.

    The losses are the run's, so is the student's batch: without `batch_size` it is the method's.
    """

    method: str
    change: dict[str, Any] = {}  # of the method's published values, such as schedule: {steps: 200}
    teacher: str | None = None  # its label, where there are several
    select: Literal["accuracy", "agreement"] = "accuracy"  # by which the best epoch is told
    samples_every: PositiveInt | None = None  # epochs; default: a tenth of the run's

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PRESETS:
            raise ValueError(unknown_name("method", name, PRESETS))
        if isinstance(PRESETS[name].schedule, Offline):
            raise ValueError(
                f"{name!r} makes its pictures before any student: write them with `kd synthesize` "
                f"and name them as `data`; methods that go with the student: {_named(online=True)}"
            )
        return name

    @model_validator(mode="after")
    def _consistent(self) -> SyntheticConfig:
        if "losses" in self.change:
            raise ValueError(
                "change.losses: what the student learns by are the losses of the run; give it there"
            )
        check_priors(self.plan.priors)
        return self

    @property
    def plan(self) -> Method:
        """The method with its changes."""
        return changed_method(self.method, self.change)

    @property
    def batch_size(self) -> int:
        """Of the student, as the method has it."""
        size: int = getattr(self.plan.schedule, self._size_of_batch)
        return size

    @property
    def batches_per_epoch(self) -> int:
        """Of the student."""
        count: int = self.plan.schedule.batches_per_epoch
        return count

    def plan_of(self, batch_size: int) -> Method:
        """The plan with the student's batch of a run."""
        plan = self.plan
        schedule = replace(plan.schedule, **{self._size_of_batch: batch_size})
        return replace(plan, schedule=schedule)

    def check_batch(self, batch_size: int, *, workers: int) -> None:
        """Raise ValueError where the changes say another size than the run, or workers cannot."""
        together = self.plan_of(batch_size).schedule.batch_size
        if together % workers:
            raise ValueError(
                f"synthetic.change.schedule.batch_size {together} must be a multiple of workers "
                f"{workers}: every worker makes as many pictures as every other"
            )
        given = self.change.get("schedule", {}).get(self._size_of_batch, batch_size)
        if given != batch_size:
            raise ValueError(
                f"batch_size is {batch_size} and synthetic.change.schedule.{self._size_of_batch} "
                f"is {given}; they are the same, so give one of them"
            )

    def check_rounds(self, epochs: int) -> None:
        """Raise ValueError for a prior that would begin after a run's last round."""
        schedule = self.plan.schedule
        if isinstance(schedule, Offline):
            return
        rounds = schedule.warmup + epochs * schedule.rounds_per_epoch
        for name, prior in self.plan.priors.items():
            if prior.weight and prior.after >= rounds:
                raise ValueError(
                    f"synthetic.change.priors.{name}.after is {prior.after} rounds, and the run "
                    f"has {rounds}: {schedule.warmup} of schedule.warmup and "
                    f"{schedule.rounds_per_epoch} in each of {epochs} epochs; set `after` lower, "
                    "or `weight` to 0"
                )

    @property
    def _size_of_batch(self) -> str:
        each_epoch = isinstance(PRESETS[self.method].schedule, EveryEpoch)
        return "student_batch_size" if each_epoch else "batch_size"

    @property
    def layers(self) -> set[str]:
        """The teacher's layers that priors look at."""
        return layers_of(self.plan)

    def identity_content(self, batch_size: int) -> dict[str, Any]:
        """Every value that decides a picture or which student is kept."""
        plan = TypeAdapter(Method).dump_python(self.plan_of(batch_size), mode="json")
        del plan["losses"]  # the run's own take their place
        return {"plan": plan, "select": self.select, "teacher": self.teacher}


def layers_of(plan: Method) -> set[str]:
    """The teacher's layers that the priors of a method look at."""
    return {one.layer for one in plan.priors.values() if one.weight} - {LOGITS}


def offline_names() -> str:
    """The methods that have a transfer set."""
    return _named(online=False)


def _named(*, online: bool) -> str:
    return ", ".join(
        name for name, one in PRESETS.items() if isinstance(one.schedule, Offline) is not online
    )


def changed_method(name: str, change: Mapping[str, Any]) -> Method:
    """A published method with other values, ``change`` of the YAML; errors of ``changed_plan``."""
    method: Method = changed_plan(PRESETS[name], change, ("change",))
    return method


def changed_plan(held: Any, changes: Any, above: tuple[str, ...]) -> Any:
    """The plan with other values, which are of the types that it declares.

    A prior that the method does not name may be added. Raises ValueError with the path of a value
    that is unknown or of the wrong kind.
    """
    if is_dataclass(held) and not isinstance(held, type):
        return _changed_fields(held, _mapping(changes, above), above)
    assert isinstance(held, Mapping)
    result = dict(held)
    for key, value in _mapping(changes, above).items():
        if above[-1] == "priors":
            result[key] = _changed_prior(held.get(key, Weighted()), value, (*above, key))
        elif key in held and is_dataclass(held[key]):
            result[key] = changed_plan(held[key], value, (*above, key))
        else:
            result[key] = value
    return result


def _changed_prior(held: Weighted, changes: Any, above: tuple[str, ...]) -> Weighted:
    if above[-1] not in PRIORS:
        raise ValueError(unknown_name("prior", above[-1], PRIORS))
    changed = changed_plan(held, changes, above)
    try:
        params = _hyperparameters(above[-1]).model_validate(changed.params)
    except ValidationError as error:
        raise ValueError("; ".join(problems(error, (*above, "params")))) from None
    return replace(changed, params=params.model_dump(exclude_unset=True))


@cache
def _hyperparameters(prior: str) -> type[Strict]:
    """The schema of a prior's ``params``, read from its function's signature."""
    signature = inspect.signature(PRIORS[prior].function, eval_str=True).parameters
    kinds: dict[str, Any] = {
        name: (_bounded(name, signature[name].annotation), signature[name].default)
        for name in PRIORS[prior].hyperparameters
    }
    return create_model(f"{prior}.params", __base__=Strict, **kinds)


def _bounded(name: str, kind: Any) -> Any:
    return Annotated[kind, _BOUNDS[name]] if name in _BOUNDS else kind


def _changed_fields(held: Any, changes: Mapping[str, Any], above: tuple[str, ...]) -> Any:
    hints = get_type_hints(type(held))
    known = [field.name for field in fields(held)]
    values = {}
    for key, value in changes.items():
        path = (*above, key)
        if key not in known:
            raise ValueError(unknown_name(f"key {'.'.join(above)}", key, known))
        current = getattr(held, key)
        if value is None and NoneType in get_args(hints[key]):
            values[key] = None
        elif is_dataclass(current) and isinstance(value, Mapping):
            values[key] = changed_plan(_with_keys(current, hints[key], value, path), value, path)
        elif is_dataclass(current) or isinstance(current, Mapping):
            values[key] = changed_plan(current, value, path)
        elif (kinds := _plans(hints[key])) and isinstance(value, Mapping):
            values[key] = changed_plan(_first_with(kinds, value, path), value, path)
        else:
            values[key] = _checked(_bounded(key, hints[key]), value, path)
    return replace(held, **values)


def _with_keys(held: Any, hint: Any, keys: Mapping[str, Any], above: tuple[str, ...]) -> Any:
    """What is held, unless only another kind of plan has all of the keys: that one's defaults."""
    kinds = [kind for kind in _plans(hint) if keys.keys() <= {one.name for one in fields(kind)}]
    if not kinds or type(held) in kinds:
        return held
    if any(one.default is MISSING and one.default_factory is MISSING for one in fields(kinds[0])):
        raise ValueError(
            f"{'.'.join(above)} has the keys of {kinds[0].__name__}, and this method has "
            f"{type(held).__name__}, which `change` cannot exchange; begin with a method that has "
            "the former, or compose one in Python of kdcore.datafree.plans.Method"
        )
    return kinds[0]()


def _plans(hint: Any) -> list[Any]:
    """The kinds of plan that a value may be of, where it may be None as well."""
    return [kind for kind in get_args(hint) if is_dataclass(kind)]


def _first_with(kinds: list[Any], keys: Mapping[str, Any], above: tuple[str, ...]) -> Any:
    """Of these kinds the first that has all of the keys, as it is without them."""
    known = {kind: [one.name for one in fields(kind)] for kind in kinds}
    for kind, names in known.items():
        if keys.keys() <= set(names):
            return kind()
    every = [name for names in known.values() for name in names]
    unknown = [key for key in keys if key not in every]
    if unknown:
        raise ValueError(unknown_name(f"key {'.'.join(above)}", unknown[0], every))
    raise ValueError(f"{'.'.join(above)}: no kind of it has all of {', '.join(keys)}")


def _mapping(changes: Any, above: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(changes, Mapping):
        raise ValueError(f"{'.'.join(above)}: expected a mapping of keys, got {changes!r}")
    return changes


def _checked(kind: Any, value: Any, path: tuple[str, ...]) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError("; ".join(problems(error, path))) from None
