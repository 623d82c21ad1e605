r"""How a variable is made of noise that knows no parameter: :math:`z = g(\epsilon, \theta)`.

The noise is a tensor that comes from outside, so that two models can be given the same: torch's own
``rsample`` takes neither noise nor a generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Size, Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    TransformedDistribution,
    constraints,
)

from kdcore.dgm.row_noise import NoiseLaw, NoiseSource, RowNoise

Gradient = Literal["none", "straight_through"]  # what passes back through a discrete variable


class Delta(Distribution):
    """All mass on one value: a deterministic feature, or what a generator makes of its noise."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"value": constraints.real}
    has_rsample = True

    def __init__(self, value: Shaped[Tensor, ...], validate_args: bool | None = None) -> None:
        self.value = value
        super().__init__(value.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.value

    @property
    def mode(self) -> Tensor:
        return self.value

    def expand(self, batch_shape: Any, _instance: Distribution | None = None) -> Delta:
        return Delta(self.value.expand(batch_shape), validate_args=False)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        return self.value.expand(Size(sample_shape) + self.value.shape)


@dataclass(frozen=True)
class Family:
    """What the distributions of one type need: their parameters, their noise, the way from it.

    ``push`` is given the distribution, noise of the law and of the shape of the first parameter,
    and whether a discrete value lets a gradient through.
    """

    parameters: tuple[str, ...]
    noise: NoiseLaw
    push: Callable[[Any, Tensor, Gradient], Tensor]


def register_family(kind: type[Distribution], family: Family) -> None:
    """Let variables of a distribution be latent.

    Raises ValueError for a type that already has a family.
    """
    if kind in _FAMILIES:
        raise ValueError(f"{kind.__name__} already has a family; subclass it to have another")
    _FAMILIES[kind] = family


def family_of(distribution: Distribution) -> Family:
    """The family of a distribution, which for one with an inverse distribution function is that.

    Raises TypeError for a distribution that nobody can make of noise; it may still be a target.
    """
    kind = type(distribution)
    if kind in _FAMILIES:
        return _FAMILIES[kind]
    if _has_icdf(distribution):
        return Family(tuple(distribution.arg_constraints), "uniform", _inverse_cdf)
    raise TypeError(
        f"no way is known to make {kind.__name__} of noise: it has no icdf; "
        "use register_family, or declare the variable as a target"
    )


def known_family(name: str) -> type[Distribution] | None:
    """The registered type of distributions of a name; None where there is none."""
    return next((kind for kind in _FAMILIES if kind.__name__ == name), None)


def innermost(distribution: Distribution) -> Distribution:
    """The distribution inside of ``Independent``, which only names dimensions."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def parameters_of(distribution: Distribution) -> dict[str, Tensor]:
    """The tensors that decide a distribution, by the names of its constructor."""
    kind = type(distribution)
    known = _FAMILIES[kind].parameters if kind in _FAMILIES else tuple(distribution.arg_constraints)
    return {name: getattr(distribution, name) for name in known}


def noise_shape(distribution: Distribution) -> Size:
    """The shape of the noise that makes one value of a distribution."""
    if type(distribution) in _FAMILIES:
        first: Tensor = getattr(distribution, _FAMILIES[type(distribution)].parameters[0])
        return first.shape
    return distribution.batch_shape + distribution.event_shape


def draw_noise(distribution: Distribution, generator: NoiseSource | None) -> Tensor | None:
    """Noise for one value of a distribution, in its type and on its device; None for a ``Delta``.

    Raises TypeError like ``family_of``.
    """
    family = family_of(distribution)
    like: Tensor = getattr(distribution, family.parameters[0])
    return _draw(family.noise, noise_shape(distribution), like, generator)


def push(
    distribution: Distribution, noise: Tensor | None, *, gradient: Gradient = "none"
) -> Tensor:
    """The value that noise makes of a distribution; a ``Delta`` needs none."""
    if isinstance(distribution, Delta):
        return distribution.value
    if noise is None:
        raise ValueError(f"{type(distribution).__name__} needs noise to make a value of, got None")
    return family_of(distribution).push(distribution, noise, gradient)


def _draw(law: NoiseLaw, shape: Size, like: Tensor, generator: NoiseSource | None) -> Tensor | None:
    if law == "none":
        return None
    if isinstance(generator, RowNoise):
        return generator.draw(law, shape, like)
    empty = torch.empty(shape, dtype=like.dtype, device=like.device)
    if law == "normal":
        return empty.normal_(generator=generator)
    if law == "gumbel":
        return empty.exponential_(generator=generator).clamp_(min=_TINY).log_().neg_()
    return empty.uniform_(generator=generator)


def _normal(law: Normal, noise: Tensor, gradient: Gradient) -> Tensor:
    return torch.addcmul(law.loc, law.scale, noise)


def _multivariate_normal(law: MultivariateNormal, noise: Tensor, gradient: Gradient) -> Tensor:
    turned: Tensor = (law.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    return law.loc + turned


def _bernoulli(law: Bernoulli, noise: Tensor, gradient: Gradient) -> Tensor:
    return _discrete((noise < law.probs).to(noise.dtype), law.probs, gradient)


def _one_hot(law: OneHotCategorical, noise: Tensor, gradient: Gradient) -> Tensor:
    chosen = (law.logits + noise).argmax(dim=-1)
    hot = F.one_hot(chosen, noise.shape[-1]).to(noise.dtype)
    return _discrete(hot, law.probs, gradient)


def _categorical(law: Categorical, noise: Tensor, gradient: Gradient) -> Tensor:
    return (law.logits + noise).argmax(dim=-1)


def _inverse_cdf(law: Distribution, noise: Tensor, gradient: Gradient) -> Tensor:
    smallest = torch.finfo(noise.dtype).eps  # at 0 and 1 the value may be infinite
    value: Tensor = law.icdf(noise.clamp(smallest, 1 - smallest))
    return value


def _discrete(value: Tensor, probability: Tensor, gradient: Gradient) -> Tensor:
    if gradient == "none":
        return value
    return value + (probability - probability.detach())  # adds exactly 0


def _has_icdf(distribution: Distribution) -> bool:
    if type(distribution).icdf is Distribution.icdf:
        return False
    if isinstance(distribution, TransformedDistribution):
        return _has_icdf(distribution.base_dist)
    return True


_TINY = torch.finfo(torch.float32).tiny

_FAMILIES: dict[type[Distribution], Family] = {
    Normal: Family(("loc", "scale"), "normal", _normal),
    MultivariateNormal: Family(("loc", "scale_tril"), "normal", _multivariate_normal),
    Bernoulli: Family(("logits",), "uniform", _bernoulli),
    Categorical: Family(("logits",), "gumbel", _categorical),
    OneHotCategorical: Family(("logits",), "gumbel", _one_hot),
    Delta: Family(("value",), "none", lambda law, noise, gradient: law.value),
}
