"""Graphical models by name, and how they learn from data: each has a ``generator`` to distil."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kdcore.checks import unknown_name
from kdcore.dgm.families import innermost
from kdcore.dgm.models.helmholtz import (
    belief_generator,
    belief_recognition,
    helmholtz_generator,
    helmholtz_recognition,
)
from kdcore.dgm.models.ladder_vae import LadderVAE
from kdcore.dgm.models.vrnn import VRNN
from kdcore.dgm.row_noise import NoiseSource
from kdcore.dgm.trace import TargetValue, Trace
from kdcore.dgm.variational import Variational, WakeSleep
from pipelines.generative.networks import (
    BeliefConfig,
    HelmholtzConfig,
    LadderConfig,
    NetworkConfig,
    VrnnConfig,
)
from pipelines.models import read_weights

Model = Variational | WakeSleep
PREFIX = "generator."  # of what is distilled, among a model's weights


def build_model(config: NetworkConfig) -> Model:
    """The model with all that it needs to learn from data, its weights random."""
    if isinstance(config, LadderConfig):
        return LadderVAE(config.ladder)
    if isinstance(config, VrnnConfig):
        return VRNN(
            length=config.length,
            hidden=config.hidden,
            state=config.state,
            latent=config.latent,
            continuous=config.continuous,
        )
    if isinstance(config, HelmholtzConfig):
        return WakeSleep(helmholtz_generator(config.width), helmholtz_recognition(config.width))
    assert isinstance(config, BeliefConfig)
    channels, height, width = config.image
    pixels = channels * height * width
    return WakeSleep(
        belief_generator(config.bits, config.width, pixels=pixels),
        belief_recognition(config.bits, config.width, pixels=pixels),
    )


def load_model(config: NetworkConfig, weights: Path) -> Model:
    """The model in evaluation mode, with weights of a file.

    A distilled one has no weights but its generator's, and the others stay random.

    Raises ValueError, with the first tensor that does not fit, for weights of another model.
    """
    model, held = build_model(config), read_weights(weights)
    own = model.state_dict()
    wrong = [name for name in held if name not in own or held[name].shape != own[name].shape]
    lacking = [name for name in own if name.startswith(PREFIX) and name not in held]
    if wrong or lacking:
        first = (wrong + lacking)[0]
        raise ValueError(f"weights {weights} are not of this {config.name}: {first!r} does not fit")
    model.load_state_dict(own | held)
    return model.eval()


def generator_weights(generator: nn.Module) -> dict[str, Tensor]:
    """The weights of a generator alone, as those of a model without the rest."""
    return {f"{PREFIX}{name}": held for name, held in generator.state_dict().items()}


def shown_as(config: NetworkConfig) -> TargetValue:
    """What is compared and shown of samples: pictures without the noise of their pixels."""
    return "mean" if isinstance(config, LadderConfig) else "draw"


def posterior_means(
    model: Model,
    targets: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    *,
    layer: str | None,
    noise: NoiseSource | None = None,
) -> Tensor:
    """The means of the latents that a model infers, side by side, or of one of them: (N, width).

    Raises ValueError for a latent that it does not have.
    """
    sites = _posterior(model, targets, inputs, noise).of_kind("latent")
    if layer is not None and layer not in sites:
        raise ValueError(f"distances.layer: {unknown_name('latent', layer, sites)}")
    chosen = sites if layer is None else {layer: sites[layer]}
    means = [innermost(site.distribution).mean.flatten(1) for site in chosen.values()]
    return torch.cat(means, dim=1)


def _posterior(
    model: Model,
    targets: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    noise: NoiseSource | None,
) -> Trace:
    if isinstance(model, Variational):
        return model.infer(targets, inputs=inputs, noise=noise).posterior
    run = Trace(len(next(iter(targets.values()))), inputs=targets, generator=noise)
    model.recognition(run)
    return run
