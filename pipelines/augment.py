"""What a view may do to a picture: the operations, their strengths and the literature's defaults.

An operation that is not named is off; one that is named without numbers, as in ``erase: {}``, has
the defaults of the source beside it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from pipelines.strict import Strict

# Of the mapping from these numbers to pixels: part of every cache's fingerprint, and from 2 on
# of the identity of every run with views. Count it up where an operation shows other pixels.
VERSION = 1

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1)]
Alpha = Annotated[float, Field(gt=0, le=32)]  # 32 is the largest of Zhang and others 2018
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Range = tuple[Positive, Positive]


class BoxConfig(Strict):
    """A box of random area and shape, both as shares: of the picture's area, width to height."""

    area: Range
    ratio: Range

    @field_validator("area", "ratio")
    @classmethod
    def _from_low_to_high(cls, ends: Range) -> Range:
        if ends[0] > ends[1]:
            raise ValueError(f"expected the lower end first, got {list(ends)}")
        return ends

    @field_validator("area")
    @classmethod
    def _within_the_picture(cls, area: Range) -> Range:
        if area[1] > 1:
            raise ValueError(f"expected shares of the picture, at most 1, got {list(area)}")
        return area


class ResizedCropConfig(BoxConfig):
    """A random box, resized to the whole picture.

    Source: Szegedy and others 2015, arXiv:1409.4842, section 6: 8 to 100 % of the area.
    """

    area: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)


class JitterConfig(Strict):
    """Each strength s draws a factor from [1 - s, 1 + s]; ``hue`` a turn of up to that share.

    Source: Howard 2013, arXiv:1312.5402, section 2; 0.4 is that of the ResNets of fb.resnet.torch
    and timm's default. Contrastive methods add hue 0.1 and probability 0.8 (Chen and others 2020,
    MoCo v2, arXiv:2003.04297).
    """

    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength = 0.4
    hue: float = Field(default=0.0, ge=0, le=0.5)
    probability: Probability = 1.0


class RandAugmentConfig(Strict):
    """``operations`` of a table of 14, drawn with replacement, all at one ``magnitude`` of 30.

    Source: Cubuk and others 2019, arXiv:1909.13719: N = 2, M = 9 for ResNet-50 on ImageNet.
    """

    operations: NonNegativeInt = 2
    magnitude: int = Field(default=9, ge=0, le=30)


class EraseConfig(BoxConfig):
    """A box filled with noise, or with one grey level of all channels.

    Source: Zhong and others 2017, arXiv:1708.04896, section 4, their RE-R: probability 0.5,
    2 to 40 % of the area, ratios from 0.3 to its inverse.
    """

    probability: Probability = 0.5
    area: Range = (0.02, 0.4)
    ratio: Range = (0.3, 1 / 0.3)
    fill: Literal["noise"] | Annotated[int, Field(ge=0, le=255)] = "noise"


class MixupConfig(Strict):
    """The average of two pictures, weighed by Beta(alpha, alpha).

    Source: Zhang and others 2018, arXiv:1710.09412, section 3.2: alpha 1 for CIFAR-10, and 0.2 for
    ImageNet, section 3.1.
    """

    alpha: Alpha = 1.0
    probability: Probability = 1.0


class CutmixConfig(Strict):
    """A box of another picture, of the share that Beta(alpha, alpha) leaves.

    Source: Yun and others 2019, arXiv:1905.04899, section 3.1, alpha 1; their code cuts half of the
    pictures of CIFAR and all of ImageNet.
    """

    alpha: Alpha = 1.0
    probability: Probability = 0.5


class AugmentConfig(Strict):
    """What a view does to a picture, in this order; numbers are drawn from (sample, view, seed).

    ``plain`` leaves out what is off, so that a new operation changes no cache and no run of before.
    """

    crop: NonNegativeInt = 0  # zero-padding in pixels before a crop of the original size
    resized_crop: ResizedCropConfig | None = None
    flip: bool = False  # horizontal, with probability 1/2
    jitter: JitterConfig | None = None
    randaugment: RandAugmentConfig | None = None
    erase: EraseConfig | None = None
    mixup: MixupConfig | None = None
    cutmix: CutmixConfig | None = None  # where both are drawn, a picture is cut

    @model_validator(mode="after")
    def _one_crop(self) -> AugmentConfig:
        if self.crop and self.resized_crop is not None:
            raise ValueError("`crop` and `resized_crop` are two ways to crop; leave one out")
        return self

    @model_serializer(mode="wrap")
    def _only_what_is_on(self, serialised: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialised(self)
        return {name: value for name, value in content.items() if value is not None}

    @property
    def mixes(self) -> bool:
        """Whether a picture may be made of two, and so have two labels."""
        return self.mixup is not None or self.cutmix is not None
