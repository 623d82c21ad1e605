"""Divergences of the variables of two runs, many in one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

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


def distances(
    name: DivergenceName,
    pairs: Mapping[str, Pair],
    *,
    over_dims: Reduction,
    over_steps: Reduction,
) -> dict[str, Float[Tensor, " b"]]:
    """The divergence of every group of variables, per row, in float32 at least.

    Variables of one type and shape are compared in one call: a recurrent model has hundreds, and of
    small ones a call costs more than its numbers.
    """
    groups = {name: group_of(name) for name in pairs}
    names = sorted(pairs, key=groups.__getitem__)  # stable: groups together, steps in order
    parts: dict[str, list[Tensor]] = {}
    for lot in _lots(names, pairs):
        values = _per_row(name, [pairs[member] for member in lot], over_dims)
        sizes = Counter(groups[member] for member in lot)
        for group, part in zip(sizes, _split(values, [*sizes.values()]), strict=True):
            parts.setdefault(group, []).append(part)
    totals = {group: held[0] if len(held) == 1 else sum_of(held) for group, held in parts.items()}
    if over_steps == "sum":
        return totals
    steps = Counter(groups.values())
    return {group: total / steps[group] for group, total in totals.items()}


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return torch.stack([*values]).sum(dim=0)


def _lots(names: Sequence[str], pairs: Mapping[str, Pair]) -> list[list[str]]:
    """The names in lots of which each has one type and one shape."""
    lots: dict[object, list[str]] = {}
    for name in names:
        key = tuple((type(innermost(site.distribution)), site.value.shape) for site in pairs[name])
        lots.setdefault(key, []).append(name)
    return list(lots.values())


def _per_row(
    name: DivergenceName, pairs: Sequence[Pair], over_dims: Reduction
) -> Float[Tensor, "n b"]:
    there, here = (_stacked([pair[side].distribution for pair in pairs]) for side in (0, 1))
    values = divergence(name, there, here)
    flat = values.reshape(len(pairs), len(pairs[0][0].value), -1)
    per_row = flat.sum(dim=2) if over_dims == "sum" else flat.mean(dim=2)
    masks = [site.mask for site, _ in pairs]
    if all(mask is None for mask in masks):
        return per_row
    kept = [torch.ones_like(per_row[0]) if mask is None else mask for mask in masks]
    return per_row * torch.stack(kept)


def _split(values: Float[Tensor, "n b"], sizes: Sequence[int]) -> Sequence[Tensor]:
    """The sums of the first rows, of the next and so on."""
    if len(sizes) == len(values):
        return values.unbind()
    return [part.sum(dim=0) for part in torch.split(values, [*sizes])]


def _stacked(laws: Sequence[Distribution]) -> Distribution:
    """One distribution in the place of several, in float32 at least."""
    laws = [innermost(law) for law in laws]
    given = [parameters_of(law) for law in laws]
    if len(laws) == 1 and all(held.dtype not in _HALF for held in given[0].values()):
        return laws[0]
    stacked = {
        name: _full_precision(torch.stack([parameters[name] for parameters in given]))
        for name in given[0]
    }
    kind: Callable[..., Distribution] = type(laws[0])
    return kind(**stacked, validate_args=False)


def _full_precision(parameter: Tensor) -> Tensor:
    return parameter.float() if parameter.dtype in _HALF else parameter
