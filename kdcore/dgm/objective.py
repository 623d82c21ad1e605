r"""What two runs of the same noise cost: divergences of their variables, weighed and reduced.

.. math:: \mathcal L = \frac1B \sum_b \Big( \sum_j d(p_T(y_j), p_S(y_j))
    + \sum_i \lambda_i \, d'(p_T(z_i), p_S(z_i)) \Big)

A group is the variables whose names agree before a bracket: ``z[0]``, ``z[1]`` are of group ``z``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from kdcore.checks import unknown_name
from kdcore.dgm.divergences import DivergenceName, divergence
from kdcore.dgm.families import innermost, parameters_of
from kdcore.dgm.trace import Site

Reduction = Literal["sum", "mean"]
Pairs = Mapping[str, tuple[Site, Site]]  # teacher's and student's, by the student's name


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


def distances(
    name: DivergenceName, pairs: Pairs, *, over_dims: Reduction, over_steps: Reduction
) -> dict[str, Float[Tensor, " b"]]:
    """The divergence of every group, per row.

    The variables of a group that have one shape are compared in one call, since a recurrent model
    has hundreds of small ones.
    """
    groups: dict[str, list[tuple[Site, Site]]] = {}
    for variable, pair in pairs.items():
        groups.setdefault(group_of(variable), []).append(pair)
    reduced = {}
    for group, members in groups.items():
        total = torch.stack([_summed(name, alike, over_dims) for alike in _alike(members)]).sum(0)
        reduced[group] = total / len(members) if over_steps == "mean" else total
    return reduced


def _alike(pairs: Sequence[tuple[Site, Site]]) -> list[list[tuple[Site, Site]]]:
    """The pairs in lots of which each has one type and one shape."""
    lots: dict[object, list[tuple[Site, Site]]] = {}
    for pair in pairs:
        key = tuple((type(innermost(site.distribution)), site.value.shape) for site in pair)
        lots.setdefault(key, []).append(pair)
    return list(lots.values())


def _summed(
    name: DivergenceName, pairs: Sequence[tuple[Site, Site]], over_dims: Reduction
) -> Float[Tensor, " b"]:
    there, here = (_stacked([pair[side].distribution for pair in pairs]) for side in (0, 1))
    values = divergence(name, there, here)
    num_steps, num_rows = len(pairs), pairs[0][0].value.shape[0]
    per_step = values.reshape(num_steps, num_rows, -1)
    per_row = per_step.sum(dim=2) if over_dims == "sum" else per_step.mean(dim=2)
    masks = [there.mask for there, _ in pairs]
    if all(mask is None for mask in masks):
        return per_row.sum(dim=0)
    kept = [torch.ones_like(per_row[0]) if mask is None else mask for mask in masks]
    return (per_row * torch.stack(kept)).sum(dim=0)


def _stacked(laws: Sequence[Distribution]) -> Distribution:
    """One distribution in the place of several, in float32 at least."""
    laws = [innermost(law) for law in laws]
    given = [parameters_of(law) for law in laws]
    if len(laws) == 1 and all(p.dtype not in _HALF for p in given[0].values()):
        return laws[0]
    stacked = {
        name: _full_precision(torch.stack([parameters[name] for parameters in given]))
        for name in given[0]
    }
    kind: Callable[..., Distribution] = type(laws[0])
    return kind(**stacked, validate_args=False)


def _full_precision(parameter: Tensor) -> Tensor:
    return parameter.float() if parameter.dtype in _HALF else parameter


_HALF = (torch.float16, torch.bfloat16)
