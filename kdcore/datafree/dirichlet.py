"""Dirichlet variables from numbers that belong to a row."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from kdcore.datafree.draws import Draw, Stream

ATTEMPTS = 16  # of which each is refused with probability 0.05 at most


def dirichlet(draw: Draw, concentration: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    r"""A prediction of each row's Dirichlet distribution, as normalised Gamma variables.

    In logarithms, :math:`G(\alpha) = G(\alpha + 1) U^{1/\alpha}`, so that a concentration of 1e-4,
    for which every Gamma variable underflows, still gives a prediction.

    Source: Marsaglia & Tsang 2000, A simple method for generating gamma variables.
    """
    classes = concentration.shape[1]
    u = draw.uniform((classes, 3, ATTEMPTS), Stream.GAMMA).to(concentration.device)
    alpha = concentration.double()
    log_gamma = _log_gamma_variable(alpha + 1, u) + u[:, :, 2, -1].log() / alpha
    return log_gamma.softmax(dim=1).to(concentration)


def _log_gamma_variable(alpha: Tensor, u: Tensor) -> Tensor:
    """The first attempt that is accepted; u is (B, K, 3, attempts), the last number unused."""
    normal = (-2 * u[:, :, 0].log()).sqrt() * (2 * math.pi * u[:, :, 1]).cos()
    d = (alpha - 1 / 3)[..., None]
    v = (1 + normal / (9 * d).sqrt()) ** 3
    bound = 0.5 * normal.square() + d - d * v + d * v.clamp(min=1e-300).log()
    fits = (v > 0) & (u[:, :, 2].log() < bound)
    fits[..., -1] = True  # 1 in 10^20
    first = fits.int().argmax(dim=2, keepdim=True)
    return (d * v.clamp(min=1e-300)).gather(2, first).squeeze(2).log()
