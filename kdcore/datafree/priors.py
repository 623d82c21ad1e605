"""The table of every prior that a method may name, and the weighted sum of those that it does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.checks import unknown_name
from kdcore.datafree import adversaries, images, predictions, statistics
from kdcore.datafree.contrast import Contrast
from kdcore.datafree.plans import Weighted
from kdcore.datafree.seen import Seen
from kdcore.datafree.statistics import Remembering
from kdcore.rows import gather_rows

OF_BATCH_NORM = {"moments", "running", "instance", "local_instance"}


@dataclass(frozen=True)
class Prior:
    """One line of ``PRIORS``: a function, or the class of a prior that remembers.

    Positional parameters come from the synthesis (``Seen``), keyword-only ones from the method. A
    class takes those of its ``forward`` to learn their shapes. ``batch_level`` says that pictures
    are taken together, so that the rows of all workers are gathered first.
    """

    function: Callable[..., Any]
    batch_level: bool = False

    @property
    def remembers(self) -> bool:
        return isinstance(self.function, type)

    @property
    def inputs(self) -> tuple[str, ...]:
        called = self.function.forward if self.remembers else self.function  # type: ignore[attr-defined]
        return tuple(
            name
            for name, parameter in inspect.signature(called).parameters.items()
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and name != "self"
        )

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        return tuple(
            name
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        )

    @property
    def needs_batch_norm(self) -> bool:
        return bool(OF_BATCH_NORM & set(self.inputs))

    @property
    def needs_student(self) -> bool:
        return "student" in self.inputs


PRIORS: Mapping[str, Prior] = {
    "class": Prior(predictions.class_cross_entropy),
    "soft_class": Prior(predictions.soft_cross_entropy),
    "soft_divergence": Prior(predictions.soft_divergence),
    "record": Prior(statistics.record_error),
    "one_hot": Prior(predictions.one_hot),
    "entropy": Prior(predictions.entropy),
    "balance": Prior(predictions.class_imbalance, batch_level=True),
    "activation": Prior(statistics.activation),
    "statistics": Prior(statistics.statistics_distance),
    "statistics_divergence": Prior(statistics.statistics_divergence),
    "averaged_statistics": Prior(statistics.AveragedDistance),
    "tv_l1": Prior(images.total_variation),
    "tv_l2": Prior(images.total_variation_norm, batch_level=True),
    "length": Prior(images.batch_length, batch_level=True),
    "mean_length": Prior(images.mean_length),
    "disagreement": Prior(adversaries.disagreement),
    "masked_disagreement": Prior(adversaries.masked_disagreement),
    "absolute_disagreement": Prior(adversaries.absolute_disagreement),
    "competition": Prior(adversaries.competition),
    "clamped_competition": Prior(adversaries.clamped_competition),
    "contrast": Prior(Contrast, batch_level=True),
}


def check_priors(weighted: Mapping[str, Weighted]) -> None:
    """Raise ValueError for an unknown prior or hyper-parameter, with the nearest name."""
    for name, one in weighted.items():
        if name not in PRIORS:
            raise ValueError(unknown_name("prior", name, PRIORS))
        known = PRIORS[name].hyperparameters
        for key in one.params:
            if key not in known:
                raise ValueError(unknown_name(f"parameter of prior {name}", key, known))


@final
class Priors(nn.Module):
    """The priors of one method with what they learn and remember.

    Raises ValueError for an unknown prior or hyper-parameter, with the nearest name.
    """

    def __init__(self, weighted: Mapping[str, Weighted], seen: Seen) -> None:
        super().__init__()
        check_priors(weighted)
        self.weighted = {name: one for name, one in weighted.items() if one.weight}
        self.remembering = nn.ModuleDict()
        for name, one in self.weighted.items():
            if PRIORS[name].remembers:
                self.remembering[name] = _made(PRIORS[name], one, seen)

    def forward(self, seen: Seen, rounds: int) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The weighted sum after so many rounds, and its parts (detached, without weights)."""
        parts = {
            name: self._value(name, one, seen)
            for name, one in self.weighted.items()
            if rounds >= one.after
        }
        weighted = [self.weighted[name].weight * value for name, value in parts.items()]
        detached = {name: value.detach() for name, value in parts.items()}
        # a round may come before all of them: the sum still has the pictures' graph
        return torch.stack([0.0 * seen.image.sum(), *weighted]).sum(), detached

    def _value(self, name: str, one: Weighted, seen: Seen) -> Tensor:
        if not PRIORS[name].needs_student:
            return self._of(name, one, seen, None)
        values = [self._of(name, one, seen, student) for student in seen.students]
        return torch.stack(values).mean()

    def _of(self, name: str, one: Weighted, seen: Seen, student: Tensor | None) -> Tensor:
        values = [seen.value(key, one.layer, student) for key in PRIORS[name].inputs]
        if PRIORS[name].batch_level:
            values = [gather_rows(value) for value in values]
        if name in self.remembering:
            held: Tensor = self.remembering[name](*values)
            return held
        computed: Tensor = PRIORS[name].function(*values, **one.params)
        return computed

    def keep(self) -> None:
        """What was seen last belongs to the best pictures of this round so far."""
        for prior in self._remembering():
            prior.keep()

    def remember(self) -> None:
        """A round is over."""
        for prior in self._remembering():
            prior.remember()

    def _remembering(self) -> list[Remembering]:
        return [held for held in self.remembering.values() if isinstance(held, Remembering)]


def _made(prior: Prior, one: Weighted, seen: Seen) -> nn.Module:
    with torch.no_grad():
        shapes = {name: seen.value(name, one.layer, None) for name in prior.inputs}
    wanted = inspect.signature(prior.function).parameters
    given = [value for name, value in shapes.items() if name in wanted]
    module: nn.Module = prior.function(*given, **one.params)
    return module
