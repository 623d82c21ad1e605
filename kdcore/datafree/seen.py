"""What a batch of pictures can be judged by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, final

from jaxtyping import Float
from torch import Tensor, nn

from kdcore.datafree.augmentation import Augmentation
from kdcore.datafree.draws import Draw
from kdcore.datafree.images import Normalisation
from kdcore.datafree.observation import Observation, observe
from kdcore.datafree.statistics import Moments
from kdcore.datafree.targets import LOGITS
from kdcore.taps import Tapped
from kdcore.terms import feature_of


@final
class Seen:
    """All that a batch of pictures can be judged by, each computed when a prior first asks.

    Networks see the ``view``, which is the augmentation's; priors on the pictures themselves see
    ``image``.
    """

    def __init__(
        self,
        image: Float[Tensor, "b c h w"],
        target: Tensor,
        draw: Draw,
        *,
        augmentation: Augmentation,
        normalisation: Normalisation,
        teacher: Tapped,
        students: Sequence[nn.Module] = (),
    ) -> None:
        self.image, self.target = image, target
        self._draw, self._augmentation, self._normalisation = draw, augmentation, normalisation
        self._teacher, self._students = teacher, students

    @cached_property
    def view(self) -> Tensor:
        return self._augmentation(self.image, self._draw, self._normalisation)

    @cached_property
    def observation(self) -> Observation:
        return observe(self._teacher, self.view)

    @property
    def teacher(self) -> Tensor:
        return self.observation.outputs.logits

    @cached_property
    def students(self) -> list[Tensor]:
        return [student(self.view).logits for student in self._students]

    def value(self, key: str, layer: str, student: Tensor | None) -> Any:
        """What a prior's parameter of this name stands for."""
        if key == "student":
            return student
        return self.feature(layer) if key == "feature" else getattr(self, key)

    def feature(self, layer: str) -> Tensor:
        outputs = self.observation.outputs
        return outputs.logits if layer == LOGITS else feature_of("teacher", outputs, layer)

    @cached_property
    def moments(self) -> tuple[Moments, ...]:
        return self.observation.moments

    @property
    def running(self) -> tuple[Moments, ...]:
        return self.observation.running

    @cached_property
    def instance(self) -> Tensor:
        return self.observation.instance

    @cached_property
    def local_instance(self) -> Tensor:
        return observe(self._teacher, self._augmentation.local(self.image, self._draw)).instance
