"""Samples of a student next to its teacher's, from the same noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from kdcore.dgm.coupling import student_name
from kdcore.dgm.families import innermost
from kdcore.dgm.objective import group_of
from kdcore.dgm.trace import Trace
from pipelines.figures import COLOURS, panels
from pipelines.generative.config import GenerativeConfig
from pipelines.generative.models import shown_as
from pipelines.generative.networks import BeliefConfig, LadderConfig, NetworkConfig, VrnnConfig
from pipelines.generative.observations import Tensors
from pipelines.generative.samples import DRAWN, conditions, noise_of
from pipelines.generative.steps import noise_maps

_PICTURES, _POINTS = 64, 272


def sample_figure(run: GenerativeConfig, student: nn.Module, teacher: nn.Module | None) -> Figure:
    """Both models' samples, row by row of one noise; of a model without a teacher its own."""
    is_of_pictures = pictured(run.model, _probe(run, student)) is not None
    rows = torch.arange(_PICTURES if is_of_pictures else _POINTS)
    if teacher is None:
        own, _ = _run(run, run.model, student, rows)
        shown = {run.name: own}
    else:
        assert run.teacher is not None
        theirs, noise = _run(run, run.teacher.network, teacher, rows)
        own, _ = _run(run, run.model, student, rows, noise=_handed(run, noise))
        shown = {"teacher": theirs, "student": own}
    figure, axes = panels(len(shown), size=4.0)
    for axis, (title, values) in zip(axes, shown.items(), strict=True):
        _draw(axis, run.model, values)
        axis.set_title(title)
    return figure


def pictured(model: NetworkConfig, targets: Tensors) -> Tensor | None:
    """Targets as pictures (N, C, H, W), where they are of any: of a sequence its rows of pixels."""
    if isinstance(model, LadderConfig):
        return targets["y"]
    if isinstance(model, BeliefConfig):
        return targets["y"].reshape(-1, *model.image)
    if isinstance(model, VrnnConfig):
        steps = [targets[f"xy[{step}]"] for step in range(model.length)]
        return torch.stack(steps, dim=1)[:, None]
    return None


def expected(run: Trace) -> Tensors:
    """The means of a run's targets, without what is drawn around them."""
    sites = run.of_kind("target").items()
    return {name: innermost(site.distribution).mean for name, site in sites}


def _probe(run: GenerativeConfig, student: nn.Module) -> Tensors:
    return _run(run, run.model, student, torch.arange(1))[0]


def _run(
    run: GenerativeConfig,
    model: NetworkConfig,
    generator: nn.Module,
    rows: Tensor,
    *,
    noise: Tensors | None = None,
) -> tuple[Tensors, Tensors]:
    """What one run shows, and the noise of its variables."""
    trace = Trace(
        len(rows),
        inputs=conditions(model, rows),
        noise=noise or {},
        targets=shown_as(model),
        generator=noise_of(run, rows, use=DRAWN),
    )
    with torch.no_grad():
        generator(trace)
    values = trace.values("target")
    drawn = {name: site.noise for name, site in trace.sites.items() if site.noise is not None}
    return (values if pictured(model, values) is None else expected(trace)), drawn


def _handed(run: GenerativeConfig, noise: Tensors) -> Tensors:
    """The teacher's noise under the student's names, as in training; a target keeps its own."""
    maps, handed = noise_maps(run), {}
    for name, held in noise.items():
        is_latent = name.startswith("z")
        own = student_name(run.distil.match, name) if is_latent else name
        if own is not None:
            change = maps.get(own) or maps.get(group_of(own))
            handed[own] = held if change is None else change(held)
    return handed


def _draw(axis: Axes, model: NetworkConfig, values: Tensors) -> None:
    image = pictured(model, values)
    if image is None:
        first, second = (held[:, 0].numpy() for held in values.values())
        axis.scatter(first, second, s=8, color=COLOURS[0], alpha=0.6, linewidths=0)
        axis.set(xlim=(-3, 3), ylim=(-3, 3))
        for name, label in zip(values, (axis.set_xlabel, axis.set_ylabel), strict=True):
            label(name)
        return
    side = math.isqrt(len(image))
    framed = F.pad(image[: side * side], (1, 1, 1, 1), value=float(image.mean()))
    tiles = framed.reshape(side, side, *framed.shape[1:])
    grid = tiles.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (H, W, C)
    low, high = (0.0, 1.0) if not _is_sequence(model) else (float(grid.min()), float(grid.max()))
    shown = ((grid - low) / max(high - low, 1e-6)).clamp(0, 1)
    axis.imshow(shown.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])


def _is_sequence(model: NetworkConfig) -> bool:
    return model.name == "vrnn"
