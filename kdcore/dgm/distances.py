"""Divergences of the variables of two runs, many in one call."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from kdcore.dgm.divergences import DivergenceName, divergence
from kdcore.dgm.families import innermost, parameters_of
from kdcore.dgm.objective import Reduction, group_of
from kdcore.dgm.trace import Site

Pair = tuple[Site, Site]  # the teacher's and the student's

_HALF = (torch.float16, torch.bfloat16)


class Lot(NamedTuple):
    """Variables of one type and shape, in the order of their groups.

    The divergence of each is ``scale`` times the sum over its rows and dimensions. It is left to
    the weights of a loss, where it costs nothing.
    """

    names: Sequence[str]
    sums: Float[Tensor, " n"]
    scale: float


def distances(
    name: DivergenceName, pairs: Mapping[str, Pair], *, over_dims: Reduction
) -> list[Lot]:
    """The divergence of every variable, in float32 at least: a mean over rows.

    Variables of one type and shape are compared in one call: a recurrent model has hundreds, and of
    small ones a call costs more than its numbers.
    """
    names = sorted(pairs, key=group_of)  # stable: groups together, steps in order
    return [
        _lot(name, {member: pairs[member] for member in lot}, over_dims)
        for lot in _lots(names, pairs)
    ]


def weighted_sum(lots: Sequence[Lot], weights: Sequence[float]) -> Float[Tensor, ""]:
    """The divergences of all variables, each with its weight, as one number."""
    sums = torch.cat([lot.sums for lot in lots])
    scales = (lot.scale for lot in lots for _ in lot.names)
    return sums @ sums.new_tensor([*map(operator.mul, weights, scales)])


def by_group(lots: Sequence[Lot], over_steps: Reduction) -> dict[str, Float[Tensor, ""]]:
    """The divergence of every group of variables, without its graph."""
    totals: dict[str, Tensor] = {}
    for lot in lots:
        sizes = Counter(map(group_of, lot.names))
        means = lot.sums.detach() * lot.scale
        for group, part in zip(sizes, _split(means, [*sizes.values()]), strict=True):
            totals[group] = totals[group] + part if group in totals else part
    if over_steps == "sum":
        return totals
    steps = num_steps(lots)
    return {group: held / steps[group] for group, held in totals.items()}


def num_steps(lots: Sequence[Lot]) -> Counter[str]:
    """How many variables each group has."""
    return Counter(group_of(name) for lot in lots for name in lot.names)


def _lots(names: Sequence[str], pairs: Mapping[str, Pair]) -> list[list[str]]:
    """The names in lots of which each has one type and one shape."""
    lots: dict[object, list[str]] = {}
    for name in names:
        there, here = pairs[name]
        laws = type(innermost(there.distribution)), type(innermost(here.distribution))
        lots.setdefault((laws, there.value.shape, here.value.shape), []).append(name)
    return list(lots.values())


def _lot(name: DivergenceName, pairs: Mapping[str, Pair], over_dims: Reduction) -> Lot:
    sides = zip(*pairs.values(), strict=True)
    there, here = (_together([site.distribution for site in sites]) for sites in sides)
    values = divergence(name, there, here)
    values = values[None] if len(pairs) == 1 else values
    values = _masked(values, [site.mask for site, _ in pairs.values()])
    scale = 1 / (values.shape[1] if over_dims == "sum" else values[0].numel())
    return Lot([*pairs], values.sum(dim=[*range(1, values.ndim)]), scale)


def _masked(
    values: Float[Tensor, "n b ..."], masks: Sequence[Tensor | None]
) -> Float[Tensor, "n b ..."]:
    if all(mask is None for mask in masks):
        return values
    every = values.new_ones(values.shape[1])
    kept = torch.stack([every if mask is None else mask for mask in masks])
    return values.reshape(*kept.shape, -1) * kept[..., None]


def _split(values: Float[Tensor, " n"], sizes: Sequence[int]) -> Sequence[Tensor]:
    """The sums of the first values, of the next and so on."""
    if len(sizes) == len(values):
        return values.unbind()
    return [part.sum() for part in torch.split(values, [*sizes])]


def _together(laws: Sequence[Distribution]) -> Distribution:
    """One distribution in the place of several, in float32 at least."""
    laws = [innermost(law) for law in laws]
    given = [parameters_of(law) for law in laws]
    if len(laws) == 1 and all(held.dtype not in _HALF for held in given[0].values()):
        return laws[0]
    together = {name: _full_precision([own[name] for own in given]) for name in given[0]}
    kind: Callable[..., Distribution] = type(laws[0])
    return kind(**together, validate_args=False)


def _full_precision(parameters: Sequence[Tensor]) -> Tensor:
    held = parameters[0] if len(parameters) == 1 else torch.stack([*parameters])
    return held.float() if held.dtype in _HALF else held
