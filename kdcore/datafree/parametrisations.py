"""What is changed until a picture is as the priors want it: its pixels, or a generator's weights.

A plan (``plans.py``) is data; a ``Parametrisation`` made from it has an optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdcore.datafree.changeable import Parametrisation
from kdcore.datafree.generated import AdaptedPictures, GeneratedPictures
from kdcore.datafree.images import Normalisation
from kdcore.datafree.pixels import PixelPictures
from kdcore.datafree.plans import Generators, Pixels, Plan


def parametrisation(
    plan: Plan, shape: Sequence[int], normalisation: Normalisation, like: Tensor
) -> Parametrisation:
    """The plan for pictures (C, H, W), on the device and of the type of ``like``.

    Generators are drawn from torch's generator, as networks are. Raises ValueError for a generator
    of pictures that are not square.
    """
    if isinstance(plan, Pixels):
        return PixelPictures(plan, shape, normalisation, like)
    if shape[1] != shape[2]:
        raise ValueError(f"a generator makes square pictures, got {shape[1]} x {shape[2]}")
    count = plan.count if isinstance(plan, Generators) else 1
    nets = [plan.network.build(shape[0], shape[1]).to(like) for _ in range(count)]
    if isinstance(plan, Generators):
        return GeneratedPictures(plan, nets, normalisation)
    return AdaptedPictures(plan, nets[0], normalisation)
