r"""What two runs of the same noise cost: divergences of their variables, weighed and reduced.

.. math:: \mathcal L = \frac1B \sum_b \Big( \sum_j d(p_T(y_j), p_S(y_j))
    + \sum_i \lambda_i \, d'(p_T(z_i), p_S(z_i)) \Big)

A group is the variables whose names agree before a bracket: ``z[0]``, ``z[1]`` are of group ``z``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from kdcore.checks import unknown_name
from kdcore.dgm.divergences import DivergenceName

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class Objective:
    r"""Which divergences, with which weight, summed or averaged over what.

    ``latent_weight`` is :math:`\lambda`, for all latents or by group; groups that a mapping leaves
    out weigh 0. It means nothing without ``over_dims``, the reduction over a latent's own
    dimensions; those of a target are always summed, as its divergence is. ``over_steps`` reduces
    over the variables of a group. A latent that is discrete passes no gradient on, so with a weight
    of 0 nothing trains its own conditional.
    """

    target: DivergenceName = "kl"
    latent: DivergenceName = "kl"
    latent_weight: float | Mapping[str, float] = 1.0
    over_dims: Reduction = "sum"
    over_steps: Reduction = "sum"

    def weight_of(self, group: str) -> float:
        """The weight of a group of latents."""
        if isinstance(self.latent_weight, Mapping):
            return self.latent_weight.get(group, 0.0)
        return self.latent_weight

    def check_groups(self, groups: Sequence[str]) -> None:
        """Raise ValueError for a weight of a group that does not exist."""
        if isinstance(self.latent_weight, Mapping):
            for group in self.latent_weight:
                if group not in groups:
                    raise ValueError(unknown_name("group of latents", group, groups))


PUBLISHED: Mapping[str, Objective] = MappingProxyType(
    {
        # of the code of Chen et al. 2023. With these weights the latents of the ladder VAE have a
        # ten-thousandth of the targets' gradient or less.
        "ladder_vae": Objective("kl", "squared_w2", 0.1, over_dims="mean"),
        "vrnn": Objective("kl", "kl", 1e-3, over_steps="mean"),
        "helmholtz": Objective("kl", "cross_entropy", 1.0),
    }
)


def group_of(name: str) -> str:
    """The part of a variable's name before its bracket."""
    return name.partition("[")[0]
