"""A teacher's run as named columns, one row a row of the run: to keep it and to read it again.

``eps/<site>`` noise, ``val/<site>`` what no noise makes, ``par/<site>/<parameter>``,
``mask/<site>``, ``in/<input>``. A kept run is a finite set of noise, to which a student may overfit
where a live teacher has new noise in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributions
from jaxtyping import Shaped
from torch import Tensor
from torch.distributions import Distribution

from kdcore.dgm.families import innermost, known_family, parameters_of, push
from kdcore.dgm.trace import Kind, Site, Trace


class SiteLayout(NamedTuple):
    """What columns do not tell of a variable: its name, its kind and its distribution's."""

    name: str
    kind: Kind
    family: str


def to_columns(trace: Trace) -> dict[str, Shaped[Tensor, "b ..."]]:
    """Everything of a run that ``from_columns`` needs to make it again, without its graph."""
    columns = {f"in/{name}": value for name, value in trace.inputs.items()}
    for name, site in trace.sites.items():
        if site.noise is not None and site.kind == "latent":
            columns[f"eps/{name}"] = site.noise
        else:
            columns[f"val/{name}"] = site.value
        if site.mask is not None:
            columns[f"mask/{name}"] = site.mask
        for parameter, held in parameters_of(innermost(site.distribution)).items():
            columns[f"par/{name}/{parameter}"] = held
    return {name: column.detach() for name, column in columns.items()}


def layout_of(trace: Trace) -> list[SiteLayout]:
    """The variables of a run in their order: strings, to be written beside the columns."""
    return [
        SiteLayout(name, site.kind, type(innermost(site.distribution)).__name__)
        for name, site in trace.sites.items()
    ]


def from_columns(
    columns: Mapping[str, Shaped[Tensor, "b ..."]], layout: Sequence[SiteLayout]
) -> Trace:
    """The run of which these are columns, or rows of them.

    Raises ValueError for a distribution that is neither torch's nor registered.
    """
    inputs = {key.removeprefix("in/"): held for key, held in columns.items() if key[:3] == "in/"}
    trace = Trace(len(next(iter(columns.values()))), inputs=inputs)
    parameters = _parameters(columns)
    for name, kind, family in layout:
        law = _type_of(family)(**parameters[name], validate_args=False)
        noise = columns.get(f"eps/{name}")
        value = columns[f"val/{name}"] if noise is None else push(law, noise)
        trace.sites[name] = Site(kind, law, value, noise, columns.get(f"mask/{name}"))
    return trace


def _parameters(columns: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parameters of each variable by name, in one pass: there may be thousands of columns."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, held in columns.items():
        if key.startswith("par/"):
            name, _, parameter = key.removeprefix("par/").rpartition("/")
            found.setdefault(name, {})[parameter] = held
    return found


def _type_of(family: str) -> Callable[..., Distribution]:
    known: Callable[..., Distribution] | None = known_family(family)
    known = known or getattr(torch.distributions, family, None)
    if known is None:
        raise ValueError(f"no distribution {family!r} is known to read columns of; register it")
    return known
