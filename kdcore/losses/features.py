"""Losses on one feature of each network, sample by sample."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from kdcore.checks import check_same_shape


def mean_squared_error(
    student: Float[Tensor, "b ..."], teacher: Float[Tensor, "b ..."]
) -> Float[Tensor, ""]:
    r"""Mean squared difference over all elements of the batch.

    .. math:: \frac{1}{BD} \sum_{bd} (s_{bd} - t_{bd})^2
    """
    check_same_shape(student, teacher)
    return (student - teacher).square().mean()
