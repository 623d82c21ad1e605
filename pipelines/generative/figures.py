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
from pipelines.generative.networks import (
    BeliefConfig,
    HelmholtzConfig,
    LadderConfig,
    NetworkConfig,
    VrnnConfig,
)
from pipelines.generative.observations import Tensors
from pipelines.generative.samples import DRAWN, conditions, noise_of
from pipelines.generative.steps import noise_maps

_PICTURES, _POINTS = 64, 272


def sample_figure(run: GenerativeConfig, student: nn.Module, teacher: nn.Module | None) -> Figure:
    """Both models' samples, row by row of one noise; of a model without a teacher its own."""
    rows = torch.arange(_POINTS if isinstance(run.model, HelmholtzConfig) else _PICTURES)
    if teacher is None:
        shown = {run.name: _shown(run.model, _run(run, run.model, student, rows, {}))}
    else:
        assert run.teacher is not None
        there = _run(run, run.teacher.network, teacher, rows, {})
        # a student of data may have other latents, and has the rows' own noise
        noise = {} if run.mode == "scratch" else _handed(run, there)
        here = _run(run, run.model, student, rows, noise)
        shown = {"teacher": _shown(run.teacher.network, there), "student": _shown(run.model, here)}
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


def _run(
    run: GenerativeConfig, model: NetworkConfig, generator: nn.Module, rows: Tensor, noise: Tensors
) -> Trace:
    """One run of a model, of noise that it was given and, where it was not, of the rows' own."""
    trace = Trace(
        len(rows),
        inputs=conditions(model, rows),
        noise=noise,
        targets=shown_as(model),
        generator=noise_of(run, rows, use=DRAWN),
    )
    with torch.no_grad():
        generator(trace)
    return trace


def _shown(model: NetworkConfig, trace: Trace) -> Tensors:
    """The targets of a run; of pictures their means, without what is drawn around them."""
    if isinstance(model, HelmholtzConfig):
        return trace.values("target")
    sites = trace.of_kind("target").items()
    return {name: innermost(site.distribution).mean for name, site in sites}


def _handed(run: GenerativeConfig, teacher: Trace) -> Tensors:
    """The teacher's noise under the student's names, as in training; a target's as it is."""
    targets = teacher.of_kind("target").items()
    handed = {name: site.noise for name, site in targets if site.noise is not None}
    maps = noise_maps(run)
    for name, held in teacher.noise().items():
        own = student_name(run.distil.match, name)
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
    # a sequence's numbers are normalised
    is_scaled = isinstance(model, VrnnConfig)
    low, high = (float(grid.min()), float(grid.max())) if is_scaled else (0.0, 1.0)
    shown = ((grid - low) / max(high - low, 1e-6)).clamp(0, 1)
    axis.imshow(shown.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
