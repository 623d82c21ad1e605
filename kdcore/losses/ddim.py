"""Denoising by DDIM: from maps with some noise to maps without, in a few steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

NUM_TIMES = 1000


def signal_shares() -> Float[Tensor, " t"]:
    r"""The share of the signal's variance that is left at each time.

    .. math:: \bar\alpha_t = \prod_{i \le t} (1 - \beta_i), \quad \beta \text{ linear from } 10^{-4}
        \text{ to } 0.02

    Source: Ho, Jain & Abbeel 2020 (DDPM), arXiv:2006.11239, section 4.
    """
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, NUM_TIMES, dtype=torch.float64), dim=0)


def denoised(
    maps: Float[Tensor, "b c h w"],
    predict: Callable[[Tensor, Tensor], Tensor],
    shares: Float[Tensor, " t"],
    *,
    steps: int,
) -> Float[Tensor, "b c h w"]:
    r"""The maps after DDIM steps through the lower half of the times, down to 0.

    .. math:: x \leftarrow \sqrt{\bar\alpha_{t'}} \, \hat x_0 + \sqrt{1 - \bar\alpha_{t'}} \,
        \hat\epsilon, \quad \hat x_0 = \frac{x - \sqrt{1 - \bar\alpha_t} \,
        \hat\epsilon}{\sqrt{\bar\alpha_t}}, \quad \hat\epsilon = \mathrm{predict}(x, t)

    Source: Song and others 2021 (DDIM), arXiv:2010.02502, equation 12 with sigma 0.
    """
    stride = NUM_TIMES // (2 * steps)
    for time in range(stride * (steps - 1), -1, -stride):
        here = shares[time].to(maps)
        before = (shares[time - stride] if time else shares.new_ones(())).to(maps)
        noise = predict(maps, torch.full((len(maps),), time, device=maps.device))
        clean = (maps - (1 - here).sqrt() * noise) / here.sqrt()
        maps = before.sqrt() * clean + (1 - before).sqrt() * noise
    return maps
