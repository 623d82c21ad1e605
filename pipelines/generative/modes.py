"""How a graphical model is trained in each mode, and how its samples are judged."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from kdcore.dgm.continual import Replay
from kdcore.dgm.divergences import DivergenceName
from kdcore.dgm.families import Gradient
from kdcore.dgm.objective import PUBLISHED, Objective, Reduction
from pipelines.networks import ModelConfig
from pipelines.strict import Strict

Mode = Literal["scratch", "surrogate", "local", "marginalized", "continual"]
DISTILLED: tuple[Mode, ...] = ("surrogate", "local", "marginalized")


class FirstConfig(Strict):
    """The first dimensions of the teacher's noise, which is wider than the student's."""

    first: PositiveInt


class DistilConfig(Strict):
    """What the student's run is compared with, by which divergence, and how it is weighed."""

    target: DivergenceName = "kl"
    latent: DivergenceName = "kl"
    # lambda: of all latents, or by group; it means nothing without the two reductions below
    weight: NonNegativeFloat | dict[str, NonNegativeFloat] = 1.0
    over_dims: Reduction = "sum"
    over_steps: Reduction = "sum"
    gradient: Gradient = "none"  # what passes back through a discrete latent
    noise: PositiveInt = 1  # samples of it for every row
    match: dict[str, str] | None = None  # teacher's latent: student's; default: of the same name
    noise_map: dict[str, FirstConfig] = {}  # student's latent: what it takes of the teacher's noise

    @model_validator(mode="before")
    @classmethod
    def _published(cls, value: Any) -> Any:
        """``like: vrnn`` takes a publication's objective, and changes it by the rest."""
        if not isinstance(value, dict) or "like" not in value:
            return value
        rest = {key: held for key, held in value.items() if key != "like"}
        if value["like"] not in PUBLISHED:
            raise ValueError(f"like: expected one of {', '.join(PUBLISHED)}, got {value['like']!r}")
        held = PUBLISHED[value["like"]]
        return {
            "target": held.target,
            "latent": held.latent,
            "weight": held.latent_weight,
            "over_dims": held.over_dims,
            "over_steps": held.over_steps,
            **rest,
        }

    @property
    def objective(self) -> Objective:
        """As kdcore takes it."""
        return Objective(
            self.target,
            self.latent,
            self.weight,
            over_dims=self.over_dims,
            over_steps=self.over_steps,
        )


class ScratchConfig(Strict):
    """How a model learns from data: by its evidence lower bound, or by wake and sleep."""

    warmup: float = Field(default=0.5, ge=0, le=1)  # share of the epochs in which the KL comes in
    condition: NonNegativeInt | None = None  # only the rows of this one; default: of all


class ContinualConfig(Strict):
    """A conditional teacher learns a new condition, and is to hold on to an old one."""

    old: NonNegativeInt = 0
    new: NonNegativeInt = 1
    share: float = Field(default=0.5, gt=0, lt=1)  # of the new condition's rows in all data
    old_weight: PositiveFloat = 1.0
    replay: Replay = "distilled"


class DistancesConfig(Strict):
    """Distances between samples, by what features of how many rows, from independent noise."""

    rows: PositiveInt = 256
    features: Literal["values", "teacher", "network"] = "values"
    layer: str | None = None  # of the teacher's posterior (z2; default: all), or of the network
    network: ModelConfig | None = None  # its weights are a file
    classes: PositiveInt = 1000  # of that network
    size: PositiveInt | None = None  # to which pictures are resized for it
    mean: tuple[float, ...] = (0.5,)  # by which they are then normalised, as its weights want
    std: tuple[PositiveFloat, ...] = (0.5,)
    data: bool = True  # also from data, which the teacher of a data-free student may have had
    paired: bool = False  # also from the teacher's own noise, which says nothing of distributions

    @model_validator(mode="after")
    def _network_has_weights(self) -> DistancesConfig:
        if (self.features == "network") != (self.network is not None):
            raise ValueError(
                "features: network goes with `network: {name, weights}`, and only then"
            )
        if self.network is not None and (self.network.weights is None or self.layer is None):
            raise ValueError("network: expected `weights: FILE` and, beside it, a `layer` to read")
        return self
