"""What a synthesis changes, whatever it is: pictures as a function of tensors with an optimiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from kdcore.datafree.draws import Draw
from kdcore.rows import num_workers, sum_over_workers


class Parametrisation(ABC):
    """Pictures as a function of tensors with an optimiser."""

    @abstractmethod
    def begin(self, draw: Draw) -> None:
        """Start a round: new noise, and whatever starts anew."""

    @abstractmethod
    def pictures(self) -> tuple[Float[Tensor, "b c h w"], ...]:
        """In the network's space, with their graph; those of each generator by themselves."""

    @abstractmethod
    def changed(self) -> list[Tensor]:
        """What a step changes."""

    @abstractmethod
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Change it, by the gradients of this worker's loss, of which the mean over workers counts.

        Weights are shared by the workers, pixels and latents are each worker's own.
        """

    @abstractmethod
    def end(self) -> None:
        """End a round."""

    @abstractmethod
    def sample(self, draw: Draw) -> Float[Tensor, "b c h w"]:
        """New pictures from what has been learned, without a graph.

        Raises RuntimeError where nothing is learned but the pictures themselves.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Between rounds."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def mean_over_workers(gradient: Tensor) -> Tensor:
    return sum_over_workers(gradient) / num_workers()
