r"""Training a model on data of its own: the evidence lower bound, and wake and sleep.

Both need a second model, of the latents given what is observed. Distillation never sees it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.dgm.distances import by_group, distances, weighted_sum
from kdcore.dgm.row_noise import NoiseSource
from kdcore.dgm.trace import Trace
from kdcore.schedules import Schedule

_NO_TENSORS: Mapping[str, Tensor] = MappingProxyType({})


class Inferred(NamedTuple):
    """Latents drawn given data, and the model at those latents and the data."""

    posterior: Trace
    joint: Trace


class Variational(nn.Module, ABC):
    """A model with the network that infers its latents; ``generator`` alone is distilled."""

    generator: nn.Module

    @abstractmethod
    def infer(
        self,
        observed: Mapping[str, Tensor],
        *,
        inputs: Mapping[str, Tensor] = _NO_TENSORS,
        noise: NoiseSource | None = None,
    ) -> Inferred:
        """Both runs, for targets by name and what the model is conditioned on."""


@dataclass(frozen=True, slots=True)
class Elbo:
    """The negative bound with its graph, and its parts without: means over rows."""

    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    kl: Mapping[str, Float[Tensor, ""]]


def negative_elbo(inferred: Inferred, *, kl_weight: float = 1.0) -> Elbo:
    r"""Minus the evidence lower bound, with a weight on its divergence.

    .. math:: -E_{q(z|y)} \log p(y | z) + \beta \sum_i E_q \,
        \mathrm{KL}\big( q(z_i | z_{>i}, y) \,\|\, p(z_i | z_{>i}) \big)

    The divergences are in closed form, so a latent that both know alike counts exactly 0.

    Source: Kingma & Welling 2014, arXiv:1312.6114, equation 3; the weight, Higgins et al. 2017.
    """
    model = inferred.joint.of_kind("latent")
    pairs = {
        name: (site, model[name]) for name, site in inferred.posterior.of_kind("latent").items()
    }
    kl = distances("kl", pairs, over_dims="sum")
    reconstruction = -inferred.joint.log_prob(["target"]).mean()
    loss = reconstruction + kl_weight * weighted_sum(kl, [1.0] * len(pairs))
    return Elbo(loss, reconstruction.detach(), by_group(kl, "sum"))


class NegativeElbo(nn.Module):
    """``negative_elbo`` as the module that DDP wraps; its weight may follow the epochs.

    Source: the warm-up from 0, Sonderby et al. 2016, arXiv:1602.02282, section 2.3.
    """

    def __init__(self, model: Variational, *, kl_weight: float | Schedule = 1.0) -> None:
        super().__init__()
        self.model, self._kl_weight = model, kl_weight

    def forward(
        self,
        observed: Mapping[str, Tensor],
        *,
        inputs: Mapping[str, Tensor] = _NO_TENSORS,
        epoch: float = 0.0,
        noise: NoiseSource | None = None,
    ) -> Elbo:
        weight = self._kl_weight
        inferred = self.model.infer(observed, inputs=inputs, noise=noise)
        return negative_elbo(
            inferred, kl_weight=weight(epoch) if isinstance(weight, Schedule) else weight
        )


class WakeSleep(nn.Module):
    r"""A generator and a recognition network that learn from each other's samples.

    .. math:: -E_{q(z|y)} \log p(y, z) - E_{p(y, z)} \log q(z | y)

    The first trains the generator only and the second the recognition only, so that one Adam for
    the sum does what two would. Their sum bounds nothing: with another q the loss is another.
    ``recognition`` has the targets as its inputs and the same latents.

    Source: Hinton, Dayan, Frey & Neal 1995, "The wake-sleep algorithm for unsupervised neural
    networks". The code of Chen et al. 2023 takes the two steps in turn.
    """

    def __init__(self, generator: nn.Module, recognition: nn.Module) -> None:
        super().__init__()
        self.generator, self.recognition = generator, recognition

    def forward(
        self, observed: Mapping[str, Tensor], *, noise: NoiseSource | None = None
    ) -> Float[Tensor, ""]:
        num_rows = len(next(iter(observed.values())))
        return self.wake(observed, num_rows, noise=noise) + self.sleep(num_rows, noise=noise)

    def wake(
        self, observed: Mapping[str, Tensor], num_rows: int, *, noise: NoiseSource | None
    ) -> Float[Tensor, ""]:
        """How unlikely the generator finds the data with the recognised latents."""
        recognised = Trace(num_rows, inputs=observed, generator=noise)
        with torch.no_grad():
            self.recognition(recognised)
        joint = Trace(num_rows, values={**recognised.values("latent"), **observed})
        self.generator(joint)
        return -joint.log_prob().mean()

    def sleep(self, num_rows: int, *, noise: NoiseSource | None) -> Float[Tensor, ""]:
        """How unlikely the recognition finds the latents of what the generator dreamt."""
        dream = Trace(num_rows, generator=noise)
        with torch.no_grad():
            self.generator(dream)
        recognised = Trace(num_rows, inputs=dream.values("target"), values=dream.values("latent"))
        self.recognition(recognised)
        return -recognised.log_prob(["latent"]).mean()
