"""Losses on where a network looks: a map's energy, or its evidence for a class, by position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_maps
from kdcore.losses.features import mean_squared_error
from kdcore.rows import unit_rows
from kdcore.types import Classifier


def attention_transfer(
    student: Float[Tensor, "b c_s h w"], teacher: Float[Tensor, "b c_t h w"], *, power: float = 2.0
) -> Float[Tensor, ""]:
    r"""Mean squared difference of unit-length spatial attention maps.

    .. math:: \frac{1}{B\,HW} \sum_b \big\| \hat a(s_b) - \hat a(t_b) \big\|^2, \quad
        a(x) = \frac1C \sum_c |x_c|^p, \quad \hat a = a / \|a\|

    Channels may differ in number, height and width may not. A map of zeros has attention zero.

    Source: Zagoruyko & Komodakis 2017, arXiv:1612.03928, with the mean of squares of their code;
    their paper has ``attention_distance``.
    """
    return _attention_difference(student, teacher, power).square().mean()


def attention_distance(
    student: Float[Tensor, "b c_s h w"], teacher: Float[Tensor, "b c_t h w"], *, power: float = 2.0
) -> Float[Tensor, ""]:
    r"""Mean distance of unit-length spatial attention maps.

    .. math:: \frac1B \sum_b \big\| \hat a(s_b) - \hat a(t_b) \big\|, \quad
        a(x) = \frac1C \sum_c |x_c|^p, \quad \hat a = a / \|a\|

    Not squared: the gradient does not fade as the student comes near.

    Source: Zagoruyko & Komodakis 2017, arXiv:1612.03928, equation 2. Its factor beta / 2, with beta
    1000 by batch size and map size, is 500 / HW here.
    """
    difference = _attention_difference(student, teacher, power)
    distance: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return distance.mean()


def class_activation(
    student: Float[Tensor, "b c h w"],
    teacher: Float[Tensor, "b d h w"],
    student_classifier: Classifier,
    teacher_classifier: Classifier,
    *,
    resolution: int = 4,
    normalise: bool = True,
) -> Float[Tensor, ""]:
    r"""Mean squared difference of class activation maps: each position's share of each logit.

    .. math:: \frac{1}{B K r^2} \sum_{bk} \big\| \hat m(s_b)_k - \hat m(t_b)_k \big\|^2, \quad
        m(x)_k = \mathrm{pool}_{r \times r} \Big( \sum_c W_{kc} x_c \Big), \quad
        \hat m = m / \|m\|

    of maps that are averaged and multiplied by the classifier, without its bias. Without
    ``normalise`` the maps' sizes count too, as for networks of one family in the published runs.

    Source: Guo and others 2023 (CAT-KD), arXiv:2304.12777. The default weight, resolution and
    normalisation are their code's for wrn-40-2 to ShuffleNetV1; its weights go from 1.8 to 600, so
    choose with care.

    Raises ValueError where a map has not as many channels as its classifier has inputs.
    """
    activations = [
        _class_activations(network, maps, classifier, resolution)
        for network, maps, classifier in (
            ("student", student, student_classifier),
            ("teacher", teacher, teacher_classifier),
        )
    ]
    return class_activation_error(*activations, normalise=normalise)


def class_activation_error(
    student: Float[Tensor, "b k r r"], teacher: Float[Tensor, "b k r r"], *, normalise: bool
) -> Float[Tensor, ""]:
    """``class_activation`` of activation maps already made and pooled."""
    here, there = student.flatten(2), teacher.flatten(2)
    if normalise:
        here, there = unit_rows(here), unit_rows(there)
    return mean_squared_error(here, there)


def _attention_difference(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    check_maps(student, teacher)
    here, there = _attention(student, power), _attention(teacher, power)
    return here - there


def _attention(maps: Tensor, power: float) -> Tensor:
    size = maps if power % 2 == 0 else maps.abs()  # an even power loses the sign by itself
    return F.normalize(size.pow(power).mean(dim=1).flatten(1))


def _class_activations(
    network: str, maps: Tensor, classifier: Classifier, resolution: int
) -> Tensor:
    if maps.ndim != 4 or maps.shape[1] != classifier.weight.shape[1]:
        raise ValueError(
            f"the {network}'s layer must be the map whose mean is the input of its classifier, "
            f"(B, {classifier.weight.shape[1]}, H, W); got {tuple(maps.shape)}"
        )
    pooled = F.adaptive_avg_pool2d(maps, resolution)  # it commutes with the classifier
    return torch.einsum("bchw,kc->bkhw", pooled, classifier.weight)
