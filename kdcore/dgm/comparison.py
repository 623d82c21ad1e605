"""The loss of two runs of the same noise: which variables are compared, and what they cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.dgm.coupling import student_name
from kdcore.dgm.distances import Lot, by_group, distances, num_steps, weighted_sum
from kdcore.dgm.families import Delta
from kdcore.dgm.objective import Objective, Reduction, group_of
from kdcore.dgm.trace import Site, Trace


@dataclass(frozen=True, slots=True)
class Distilled:
    """The loss with its graph, its parts by group without (means over rows), and the two runs.

    ``target`` sums to the surrogate, ``latent`` is before its weights. Of exact marginals the only
    part is the target "marginal", and the runs are None.
    """

    loss: Float[Tensor, ""]
    target: Mapping[str, Float[Tensor, ""]]
    latent: Mapping[str, Float[Tensor, ""]]
    teacher: Trace | None = None
    student: Trace | None = None


def compare(
    teacher: Trace,
    student: Trace,
    objective: Objective,
    *,
    match: Mapping[str, str] | None,
    adapters: nn.ModuleDict,
) -> Distilled:
    """What two runs cost, in float32 at least.

    Raises ValueError for targets that differ in name, and for weights of unknown groups.
    """
    with torch.autocast(_device_type(teacher), enabled=False):
        target = _target_distances(teacher, student, objective)
        latent = _latent_distances(_paired(teacher, student, match), objective, adapters)
        objective.check_groups([*num_steps(latent)])
        how = objective.over_steps
        weights = _weights(target, lambda group: 1.0, how)
        weights += _weights(latent, objective.weight_of, how)
        loss = weighted_sum([*target, *latent], weights)
    return Distilled(loss, by_group(target, how), by_group(latent, how), teacher, student)


def _weights(
    lots: Sequence[Lot], weight_of: Callable[[str], float], over_steps: Reduction
) -> list[float]:
    """What the divergence of each variable counts in the loss."""
    steps = num_steps(lots)
    weights = {
        group: weight_of(group) / (count if over_steps == "mean" else 1)
        for group, count in steps.items()
    }
    return [weights[group_of(name)] for lot in lots for name in lot.names]


def _device_type(run: Trace) -> str:
    return next((site.value.device.type for site in run.sites.values()), "cpu")


def _target_distances(teacher: Trace, student: Trace, how: Objective) -> list[Lot]:
    there, here = teacher.of_kind("target"), student.of_kind("target")
    if set(there) != set(here) or not there:
        raise ValueError(
            f"teacher and student must have the same targets, at least one: got {sorted(there)} "
            f"and {sorted(here)}"
        )
    pairs = {name: (site, here[name]) for name, site in there.items()}
    return distances(how.target, pairs, over_dims="sum")


def _paired(
    teacher: Trace, student: Trace, match: Mapping[str, str] | None
) -> dict[str, tuple[Site, Site]]:
    here = student.of_kind("latent")
    names = {student_name(match, name): site for name, site in teacher.of_kind("latent").items()}
    return {name: (site, here[name]) for name, site in names.items() if name in here}


def _latent_distances(
    pairs: Mapping[str, tuple[Site, Site]], how: Objective, adapters: nn.ModuleDict
) -> list[Lot]:
    alike, adapted = {}, {}
    for name, (there, here) in pairs.items():
        if there.value.shape == here.value.shape:
            alike[name] = (there, here)
        elif group_of(name) in adapters:
            adapted[name] = (_mean(there), _mean(here, adapters[group_of(name)]))
        else:
            _warn_of_shapes(name, there, here)
    plain = distances(how.latent, alike, over_dims=how.over_dims)
    return plain + distances("squared_w2", adapted, over_dims=how.over_dims)


def _mean(site: Site, adapter: nn.Module | None = None) -> Site:
    mean = site.distribution.mean
    value = mean if adapter is None else adapter(mean)
    return Site("latent", Delta(value), value, mask=site.mask)


def _warn_of_shapes(name: str, there: Site, here: Site) -> None:
    warnings.warn(
        f"latent {name!r} is not compared: the teacher's shape is {tuple(there.value.shape)}, the "
        f"student's {tuple(here.value.shape)}; an adapter would compare their means",
        stacklevel=2,
    )
