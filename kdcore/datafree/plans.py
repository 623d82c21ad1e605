"""A data-free method as data: what is changed, to what end, when, what the student learns by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdcore.datafree.augmentation import Augmentation
from kdcore.datafree.generators import GeneratorNetwork
from kdcore.datafree.targets import Targets
from kdcore.taps import EMBEDDING

Betas = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Each picture by itself, from noise.

    ``start`` is a standard normal in the network's space, or uniform pixels, or dark ones,
    N(0.15, 0.1) as Lopes and others have for MNIST. ``bounds`` is what follows every step:
    ``clip`` each pixel to what a picture can hold, or ``stretch`` the batch's darkest and brightest
    pixel to the ends of the range (ZSKD).
    """

    lr: float
    betas: Betas = (0.9, 0.999)
    start: Literal["normal", "uniform", "dark"] = "normal"
    bounds: Literal["none", "clip", "stretch"] = "clip"


@dataclass(frozen=True, kw_only=True)
class Generators:
    """One generator or several that learn on over all rounds; several share a batch alike.

    With ``annealed_over`` the rate falls to 0 along a cosine over so many rounds.
    """

    network: GeneratorNetwork
    lr: float
    betas: Betas = (0.9, 0.999)
    annealed_over: int | None = None
    count: int = 1
    clip_norm: float | None = None
    sample_in: Literal["train", "eval"] = "train"  # what BatchNorm does for the student's pictures


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A generator and its latents, adapted together in each round.

    It starts from new weights (``redrawn``, CMI), from those of the last round (``sequential``), or
    from meta-weights that after each round move by the sum of the round's gradients (``fomaml``) or
    towards where it came (``reptile``).
    """

    network: GeneratorNetwork
    lr: float
    latent_lr: float
    betas: Betas = (0.5, 0.999)
    kind: Literal["redrawn", "sequential", "fomaml", "reptile"] = "redrawn"
    meta_lr: float = 0.0  # the codes' is lr times the steps of a round


Plan = Pixels | Generators | Adapted


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """One prior of a method, by its name in ``PRIORS``."""

    weight: float = 1.0
    after: int = 0  # rounds of synthesis without it
    params: Mapping[str, Any] = field(default_factory=dict)
    layer: str = EMBEDDING  # the teacher's, or "logits", for priors on a feature


@dataclass(frozen=True, kw_only=True)
class Offline:
    """A transfer set, made once before any student."""

    batch_size: int
    steps: int  # of the optimiser, for each batch


@dataclass(frozen=True, kw_only=True)
class EveryEpoch:
    """A batch of pictures into the pool every epoch, then steps of the student from the pool."""

    batch_size: int
    steps: int
    student_steps: int
    student_batch_size: int
    warmup: int = 0  # rounds of synthesis before the student's first step

    @property
    def batches_per_epoch(self) -> int:
        """Of the student."""
        return self.student_steps

    @property
    def rounds_per_epoch(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class Alternation:
    """Some steps of the generator, some of the student, in turn.

    The student sees ``fresh`` pictures, those of the ``same_latents`` as the generator's last step,
    or the ``same_pictures`` that this step was taken on (one backward pass for both, as published).
    With ``replay`` every second one of its batches is of older pictures, those of the pool.
    """

    batch_size: int
    steps: int = 1  # of the generator, all on the same latents
    student_steps: int = 1
    student_sees: Literal["fresh", "same_latents", "same_pictures"] = "fresh"
    rounds: int  # in an epoch
    warmup: int = 0
    replay: bool = False

    @property
    def batches_per_epoch(self) -> int:
        """Of the student."""
        return self.rounds * self.student_steps

    @property
    def rounds_per_epoch(self) -> int:
        return self.rounds


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """One loss by which the student learns, by its name in ``LOSSES``."""

    weight: float = 1.0
    params: Mapping[str, Any] = field(default_factory=dict)
    per_class: bool = False  # divided by the number of classes
    maps: bool = False  # needs pairs of layers, which only a run can name


@dataclass(frozen=True, kw_only=True)
class Method:
    """Everything that tells one data-free method from another.

    Raises ValueError for replay from a pool without a limit.
    """

    images: Plan
    priors: Mapping[str, Weighted]
    targets: Targets | None = None  # None: whatever the teacher chooses
    view: Augmentation = field(default_factory=Augmentation)  # of the pictures being made
    schedule: Offline | EveryEpoch | Alternation
    keep: Literal["best", "last"] = "best"  # of a round: those judged best, or after its last step
    student_mode: Literal["eval", "train"] = "eval"  # while pictures are made against it
    pool_limit: int | None = None
    student_view: Augmentation = field(default_factory=Augmentation)  # of those it gets
    losses: Mapping[str, Distilled]

    def __post_init__(self) -> None:
        if isinstance(self.schedule, Alternation) and self.schedule.replay and not self.pool_limit:
            raise ValueError(
                "replay keeps the pictures of every round, in memory and in every checkpoint: give "
                "`pool_limit`, the number of the newest pictures that are replayed"
            )
