"""Which graphical models a run may name, each with every size that decides its networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from kdcore.dgm.models.ladder import SIZES, Ladder
from pipelines.strict import Strict


class LadderConfig(Strict):
    """A hierarchical VAE of pictures in [0, 1], Gaussian latents of 16 channels from z1 up."""

    name: Literal["ladder_vae"]
    width: PositiveInt
    image: tuple[PositiveInt, PositiveInt, PositiveInt]  # channels, height, width
    # of the latents, from z1 up to 1; default: published ones, else halved from half the picture
    sizes: tuple[PositiveInt, ...] | None = None
    # the classes of each condition, such as [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    conditions: tuple[tuple[NonNegativeInt, ...], ...] = ()

    @model_validator(mode="after")
    def _fits_the_picture(self) -> LadderConfig:
        if self.image[1] != self.image[2]:
            raise ValueError(f"image: expected a square, got {self.image}; give data.size")
        classes = [one for classes in self.conditions for one in classes]
        if len(self.conditions) == 1 or len(set(classes)) < len(classes):
            raise ValueError("conditions: expected two or more lists of classes that share none")
        _ = self.ladder
        return self

    @property
    def ladder(self) -> Ladder:
        """The sizes as kdcore takes them."""
        channels, height, _ = self.image
        return Ladder(
            self.width,
            height,
            self.sizes or SIZES.get(height) or _halved(height),
            image_channels=channels,
            num_conditions=len(self.conditions),
        )


class VrnnConfig(Strict):
    """A recurrent VAE of sequences whose steps are a bit and some numbers."""

    name: Literal["vrnn"]
    hidden: PositiveInt
    state: PositiveInt
    latent: PositiveInt = 16
    length: PositiveInt
    continuous: PositiveInt  # numbers of a step beside its bit

    @model_validator(mode="after")
    def _has_steps(self) -> VrnnConfig:
        if self.length < 2:
            raise ValueError(f"length: a sequence has two steps at least, got {self.length}")
        return self


class HelmholtzConfig(Strict):
    """The machine of two numbers, such as the eruptions of Old Faithful; 8 bits in four latents."""

    name: Literal["helmholtz"]
    width: PositiveInt


class BeliefConfig(Strict):
    """A Helmholtz machine of pictures made of bits: where a pixel is above one half."""

    name: Literal["belief_network"]
    width: PositiveInt
    bits: tuple[PositiveInt, ...] = Field(min_length=1)  # of each latent, from z1 up
    image: tuple[PositiveInt, PositiveInt, PositiveInt]


NetworkConfig = Annotated[
    LadderConfig | VrnnConfig | HelmholtzConfig | BeliefConfig, Field(discriminator="name")
]


def _halved(height: int) -> Sequence[int]:
    sizes = [height // 2]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return tuple(sizes)
