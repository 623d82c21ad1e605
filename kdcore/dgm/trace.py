"""One ordinary run of a model, with every variable that it met on record.

A model is any module whose ``forward`` takes a ``Trace`` and asks it for its variables in turn.
What the trace hands out decides the regime: noise that it was given, values that it was given, or
draws of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributions import Distribution

from kdcore.checks import unknown_name
from kdcore.dgm.families import Delta, Gradient, draw_noise, family_of, innermost, noise_shape, push
from kdcore.dgm.row_noise import NoiseSource

Kind = Literal["latent", "target"]
TargetValue = Literal["draw", "mean", "mode"]

_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Site:
    """One variable of a run: its distribution given its parents, and the value that it took.

    ``noise`` is None where the value was given or needs none. ``mask``, of zeros and ones per row,
    leaves out rows that have no such variable, such as a sequence that has ended.
    """

    kind: Kind
    distribution: Distribution
    value: Tensor
    noise: Tensor | None = None
    mask: Tensor | None = None


class Trace:
    """What a model runs on: rows and inputs go in, and the variables of the run are kept.

    ``noise`` and ``values`` belong to variables by name; a value wins over noise, and what neither
    has is drawn. A target's value never has a gradient: it is a sample of a distribution which is
    compared as such, and all that its descendants see. ``targets`` other than "draw" make it the
    mean or the mode, of which no bound is known.

    ``generator`` makes the noise repeatable; a target that is no function of noise cannot use it.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        inputs: Mapping[str, Tensor] = _NOTHING,
        noise: Mapping[str, Tensor] = _NOTHING,
        values: Mapping[str, Tensor] = _NOTHING,
        gradient: Gradient = "none",
        targets: TargetValue = "draw",
        generator: NoiseSource | None = None,
    ) -> None:
        self.num_rows = num_rows
        self.sites: dict[str, Site] = {}
        self.inputs, self._noise, self._values = inputs, noise, values
        self._gradient, self._targets, self._generator = gradient, targets, generator

    def input(self, name: str) -> Tensor:
        """What the run is conditioned on."""
        if name not in self.inputs:
            raise ValueError(unknown_name("input", name, self.inputs))
        return self.inputs[name]

    def latent(
        self, name: str, distribution: Distribution, *, mask: Shaped[Tensor, " b"] | None = None
    ) -> Tensor:
        """The value of a latent variable.

        Raises ValueError for a name that was used before and for given tensors of another shape,
        TypeError for a distribution that cannot be made of noise.
        """
        return self._site("latent", name, distribution, mask)

    def target(
        self, name: str, distribution: Distribution, *, mask: Shaped[Tensor, " b"] | None = None
    ) -> Tensor:
        """The value of a target, without a gradient. Raises ValueError like ``latent``."""
        return self._site("target", name, distribution, mask)

    def feature(self, name: str, value: Float[Tensor, "b ..."]) -> Tensor:
        """A latent without noise: a layer of the network."""
        return self._site("latent", name, Delta(value), None)

    def of_kind(self, kind: Kind) -> dict[str, Site]:
        """The variables of one kind, in the order of the run."""
        return {name: site for name, site in self.sites.items() if site.kind == kind}

    def values(self, kind: Kind) -> dict[str, Tensor]:
        """The values of the variables of one kind, by name."""
        return {name: site.value for name, site in self.of_kind(kind).items()}

    def noise(self) -> dict[str, Tensor]:
        """The noise of the latent variables that were made of any, by name."""
        latents = self.of_kind("latent").items()
        return {name: site.noise for name, site in latents if site.noise is not None}

    def log_prob(self, kinds: Iterable[Kind] = ("latent", "target")) -> Float[Tensor, " b"]:
        """The log density of the values, per row; deterministic variables have none and count 0."""
        wanted = set(kinds)
        parts = [
            _log_prob(site)
            for site in self.sites.values()
            if site.kind in wanted and not isinstance(innermost(site.distribution), Delta)
        ]
        if not parts:
            raise ValueError(f"the run has no random variable of the kinds {sorted(wanted)}")
        return torch.stack(parts).sum(dim=0)

    def _site(
        self, kind: Kind, name: str, distribution: Distribution, mask: Tensor | None
    ) -> Tensor:
        if name in self.sites:
            raise ValueError(f"the run has two variables {name!r}; number them, as in 'z[3]'")
        value, noise = self._value(kind, name, distribution)
        if kind == "target":
            value = value.detach()
        self.sites[name] = Site(kind, distribution, value, noise, mask)
        return value

    def _value(
        self, kind: Kind, name: str, distribution: Distribution
    ) -> tuple[Tensor, Tensor | None]:
        if name in self._values:
            value = self._values[name]
            _check_shape("value", name, value, distribution.batch_shape + distribution.event_shape)
            return value, None
        if kind == "target" and self._targets != "draw":
            chosen: Tensor = getattr(distribution, self._targets)
            return chosen, None
        return self._drawn(kind, name, innermost(distribution))

    def _drawn(self, kind: Kind, name: str, law: Distribution) -> tuple[Tensor, Tensor | None]:
        if kind == "target" and name not in self._noise and not _is_made_of_noise(law):
            self._check_no_generator(name, law)
            return law.sample(), None
        noise = self._noise[name] if name in self._noise else draw_noise(law, self._generator)
        if noise is not None:
            _check_shape("noise", name, noise, noise_shape(law))
        return push(law, noise, gradient=self._gradient), noise

    def _check_no_generator(self, name: str, law: Distribution) -> None:
        if self._generator is not None:
            raise TypeError(
                f"target {name!r} is {type(law).__name__}, which torch draws from its global state "
                "only; leave out the generator, or give the distribution a family"
            )


def _is_made_of_noise(law: Distribution) -> bool:
    try:
        family_of(law)
    except TypeError:
        return False
    return True


def _log_prob(site: Site) -> Float[Tensor, " b"]:
    density = site.distribution.log_prob(site.value)
    density = density.reshape(len(density), -1).sum(dim=1)
    return density if site.mask is None else density * site.mask


def _check_shape(what: str, name: str, given: Tensor, expected: torch.Size) -> None:
    if given.shape != expected:
        raise ValueError(
            f"variable {name!r} has {what} of shape {tuple(expected)}, was given "
            f"{tuple(given.shape)}; teacher and student of other sizes need `noise_maps` or `match`"
        )
