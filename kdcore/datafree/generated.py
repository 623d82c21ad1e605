"""Pictures whose generators are changed: over all rounds, or anew with their latents in each."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.datafree.changeable import Parametrisation, mean_over_workers
from kdcore.datafree.draws import Draw, Stream
from kdcore.datafree.generators import Generator, redraw
from kdcore.datafree.images import Normalisation
from kdcore.datafree.plans import Adapted, Generators
from kdcore.rows import num_workers
from kdcore.schedules import Cosine

REPTILE_SCALE = 67.0  # of the code of FastDFKD, without a reason


def reptile_gradient(meta: Float[Tensor, ...], adapted: Float[Tensor, ...]) -> Float[Tensor, ...]:
    r"""The meta-weights' gradient of Reptile, :math:`67 (\theta - \theta')`.

    Source: the code of Fang and others 2022 (FastDFKD), arXiv:2112.15278.
    """
    return REPTILE_SCALE * (meta - adapted)


@final
class GeneratedPictures(Parametrisation):
    def __init__(
        self, plan: Generators, nets: Sequence[Generator], normalisation: Normalisation
    ) -> None:
        self.plan, self.normalisation = plan, normalisation
        self.nets = tuple(nets)
        self.optimizers = [
            torch.optim.Adam(trained(net), plan.lr, betas=plan.betas) for net in nets
        ]
        self.rounds = 0

    def begin(self, draw: Draw) -> None:
        self.latents = self._latents(draw)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._lr()

    def _lr(self) -> float:
        if self.plan.annealed_over is None:
            return self.plan.lr
        return Cosine(self.plan.lr, 0.0, float(self.plan.annealed_over))(float(self.rounds))

    def _latents(self, draw: Draw) -> list[Tensor]:
        count = len(self.nets)
        return [_latents(net, draw.part(number, count)) for number, net in enumerate(self.nets)]

    def pictures(self) -> tuple[Tensor, ...]:
        return self._rendered(self.latents)

    def _rendered(self, latents: Sequence[Tensor], *, training: bool = True) -> tuple[Tensor, ...]:
        pairs = zip(self.nets, latents, strict=True)
        return tuple(
            _rendered(net.train(training), latent, self.normalisation) for net, latent in pairs
        )

    def changed(self) -> list[Tensor]:
        return [held for net in self.nets for held in trained(net)]

    def step(self, gradients: Sequence[Tensor]) -> None:
        remaining = iter(gradients)
        for net, optimizer in zip(self.nets, self.optimizers, strict=True):
            weights = trained(net)
            for held in weights:
                held.grad = mean_over_workers(next(remaining))
            if self.plan.clip_norm is not None:
                nn.utils.clip_grad_norm_(weights, self.plan.clip_norm)
            optimizer.step()

    def end(self) -> None:
        self.rounds += 1

    @torch.no_grad()
    def sample(self, draw: Draw) -> Tensor:
        training = self.plan.sample_in == "train"
        return torch.cat(self._rendered(self._latents(draw), training=training))

    def state_dict(self) -> dict[str, Any]:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        nets = [net.state_dict() for net in self.nets]
        return {"nets": nets, "optimizers": optimizers, "rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for net, held in zip(self.nets, state["nets"], strict=True):
            net.load_state_dict(held)
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        self.rounds = state["rounds"]


@final
class AdaptedPictures(Parametrisation):
    def __init__(self, plan: Adapted, net: Generator, normalisation: Normalisation) -> None:
        self.plan, self.normalisation = plan, normalisation
        self.meta = net
        self.meta_optimizer = torch.optim.Adam(trained(net), plan.meta_lr, betas=plan.betas)

    def begin(self, draw: Draw) -> None:
        self.latent = _latents(self.meta, draw).requires_grad_()
        if self.plan.kind == "redrawn":
            redraw(self.meta, torch.Generator().manual_seed(self._weights_seed(draw)))
        learning = self.plan.kind in ("fomaml", "reptile")
        self.net = copy.deepcopy(self.meta) if learning else self.meta
        self.meta_optimizer.zero_grad(set_to_none=True)
        groups: list[dict[str, Any]] = [
            {"params": trained(self.net)},
            {"params": [self.latent], "lr": self.plan.latent_lr},
        ]
        self.optimizer = torch.optim.Adam(groups, self.plan.lr, betas=self.plan.betas)

    @staticmethod
    def _weights_seed(draw: Draw) -> int:
        return int(draw.shared().integers((), 2**31, Stream.WEIGHTS))

    def pictures(self) -> tuple[Tensor, ...]:
        return (_rendered(self.net.train(), self.latent, self.normalisation),)

    def changed(self) -> list[Tensor]:
        return [*trained(self.net), self.latent]

    def step(self, gradients: Sequence[Tensor]) -> None:
        *of_weights, of_latent = gradients
        for held, meta, mine in zip(trained(self.net), trained(self.meta), of_weights, strict=True):
            held.grad = mean_over_workers(mine)
            if self.plan.kind == "fomaml":
                meta.grad = held.grad.clone() if meta.grad is None else meta.grad + held.grad
        self.latent.grad = of_latent / num_workers()
        self.optimizer.step()

    @torch.no_grad()
    def end(self) -> None:
        if self.net is self.meta:
            return
        pairs = list(zip(trained(self.meta), trained(self.net), strict=True))
        if self.plan.kind == "reptile":
            for meta, adapted in pairs:
                meta.grad = reptile_gradient(meta, adapted)
        self.meta_optimizer.step()
        for kept, seen in zip(self.meta.buffers(), self.net.buffers(), strict=True):
            kept.copy_(seen)

    @torch.no_grad()
    def sample(self, draw: Draw) -> Tensor:
        return _rendered(self.meta.train(), _latents(self.meta, draw), self.normalisation)

    def state_dict(self) -> dict[str, Any]:
        return {"net": self.meta.state_dict(), "optimizer": self.meta_optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.meta.load_state_dict(state["net"])
        self.meta_optimizer.load_state_dict(state["optimizer"])


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [held for held in net.parameters() if held.requires_grad]


def _latents(net: Generator, draw: Draw) -> Tensor:
    return draw.normal((net.latent,), Stream.LATENT).to(net.linear.weight.detach())


def _rendered(net: Generator, latent: Tensor, normalisation: Normalisation) -> Tensor:
    image: Tensor = net(latent)
    return normalisation.to_network(image) if net.makes_pixels else image
