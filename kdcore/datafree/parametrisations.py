"""What is changed until a picture is as the priors want it: its pixels, or a generator's weights.

A plan (``plans.py``) is data; a ``Parametrisation`` made from it has an optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kdcore.datafree.changeable import Parametrisation
from kdcore.datafree.generated import AdaptedPictures, GeneratedPictures
from kdcore.datafree.images import Normalisation
from kdcore.datafree.pixels import PixelPictures
from kdcore.datafree.plans import Generators, Pixels, Plan


def parametrisation(
    plan: Plan, shape: Sequence[int], normalisation: Normalisation, teacher: nn.Module
) -> Parametrisation:
    """The plan for pictures (C, H, W), on the device of the teacher and of its type.

    Generators have its layout too, and are drawn from torch's generator, as networks are. Raises
    ValueError for a generator of pictures that are not square.
    """
    like = next(teacher.parameters()).detach()
    if isinstance(plan, Pixels):
        return PixelPictures(plan, shape, normalisation, like)
    if shape[1] != shape[2]:
        raise ValueError(f"a generator makes square pictures, got {shape[1]} x {shape[2]}")
    count = plan.count if isinstance(plan, Generators) else 1
    layout = memory_format_of(teacher)
    nets = [
        plan.network.build(shape[0], shape[1]).to(like).to(memory_format=layout)
        for _ in range(count)
    ]
    if isinstance(plan, Generators):
        return GeneratedPictures(plan, nets, normalisation)
    return AdaptedPictures(plan, nets[0], normalisation)


def memory_format_of(net: nn.Module) -> torch.memory_format:
    """Channels last where all convolutions are: what one net hands the next is then not copied.

    Kernels of one channel or of one pixel are of both layouts and say nothing.
    """
    kernels = [
        held
        for held in net.parameters()
        if held.dim() == 4 and held.shape[1] > 1 and held.shape[2:].numel() > 1
    ]
    last = [held.is_contiguous(memory_format=torch.channels_last) for held in kernels]
    return torch.channels_last if last and all(last) else torch.contiguous_format
