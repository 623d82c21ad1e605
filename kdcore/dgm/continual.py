"""Learning a new condition without the data of the old: by distillation or by replay."""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.dgm.distiller import DGMDistiller
from kdcore.dgm.objective import Objective
from kdcore.dgm.row_noise import NoiseSource
from kdcore.dgm.variational import Elbo, Variational, negative_elbo

Replay = Literal["distilled", "generated"]


class ContinualStep(nn.Module):
    r"""The loss of a conditional model on pictures of a new condition, holding on to an old one.

    .. math:: \tfrac12 \big( (1 - r) \, \alpha \, \mathcal L_\text{old}
        + r \, \mathcal L_\text{ELBO}(y, c_\text{new}) \big)

    The old one is distilled from the model as it is when this is made, or, as the baseline, learned
    by ELBO from as many of its samples. r is the new condition's share of all data,
    :math:`\alpha` the weight of the old. Only the generator keeps what it knew: with "distilled",
    nothing protects how the old condition's latents are inferred.

    Source: Chen et al. 2023, "Knowledge distillation for deep directed graphical models", CVPR,
    whose code leaves out the divergence of the top latent. Generative replay: Shin et al. 2017,
    arXiv:1705.08690.
    """

    def __init__(
        self,
        model: Variational,
        objective: Objective,
        *,
        num_conditions: int,
        old: int,
        new: int,
        new_share: float,
        old_weight: float = 1.0,
        replay: Replay = "distilled",
    ) -> None:
        super().__init__()
        self.model = model
        self._remembered = DGMDistiller(copy.deepcopy(model.generator), model.generator, objective)
        self._num_conditions, self._old, self._new = num_conditions, old, new
        self._new_share, self._old_weight, self._replay = new_share, old_weight, replay

    def forward(
        self, image: Float[Tensor, "b c h w"], *, noise: NoiseSource | None = None
    ) -> Float[Tensor, ""]:
        learned = self._elbo(image, self._new, noise).loss
        kept = self._old_loss(image, noise)
        return ((1 - self._new_share) * self._old_weight * kept + self._new_share * learned) / 2

    def _old_loss(self, like: Tensor, noise: NoiseSource | None) -> Tensor:
        inputs = {"condition": self._condition(like, self._old)}
        if self._replay == "distilled":
            loss: Tensor = self._remembered(len(like), inputs=inputs, generator=noise).loss
            return loss
        dream = self._remembered.run_teacher(len(like), inputs=inputs, generator=noise)
        return self._elbo(dream.values("target")["y"], self._old, noise).loss

    def _elbo(self, image: Tensor, condition: int, noise: NoiseSource | None) -> Elbo:
        inputs = {"condition": self._condition(image, condition)}
        return negative_elbo(self.model.infer({"y": image}, inputs=inputs, noise=noise))

    def _condition(self, like: Tensor, condition: int) -> Float[Tensor, "b n"]:
        chosen = torch.full((len(like),), condition, device=like.device)
        return F.one_hot(chosen, self._num_conditions).to(like.dtype)
