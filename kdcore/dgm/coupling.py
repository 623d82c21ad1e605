r"""Which noise of the teacher the student is given.

The surrogate bounds the divergence of the marginals for any coupling of the two noises that leaves
each its own law. So latents may differ in number and in size, as long as a map keeps the law.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from kdcore.dgm.objective import group_of

NoiseMap = Callable[[Tensor], Tensor]


def first_dimensions(width: int) -> NoiseMap:
    """The first ``width`` of the teacher's noise along the last dimension, of whatever law."""

    def prefix(noise: Float[Tensor, "... k"]) -> Float[Tensor, "... m"]:
        if noise.shape[-1] < width:
            raise ValueError(f"asked for the first {width} dimensions of {noise.shape[-1]}")
        return noise[..., :width]

    return prefix


def orthogonal(matrix: Float[Tensor, "m k"]) -> NoiseMap:
    r"""Gaussian noise through a matrix with orthonormal rows, which leaves it Gaussian.

    .. math:: \epsilon_S = A \epsilon_T, \quad A A^\top = I

    Raises ValueError for any other matrix.
    """
    gram = matrix @ matrix.mT
    off = (gram - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)).abs().max()
    if off > len(matrix) * torch.finfo(matrix.dtype).eps * 10:
        raise ValueError(
            f"the rows of the matrix must be orthonormal, A A^T differs from I by {float(off):.1e}"
        )

    def turned(noise: Float[Tensor, "... k"]) -> Float[Tensor, "... m"]:
        return noise @ matrix.mT.to(noise)

    return turned


def student_name(match: Mapping[str, str] | None, teacher: str) -> str | None:
    """Which of the student's latents answers to one of the teacher's; None where none does.

    ``match`` is from teacher to student, by variable or by group; without it names are the same.
    """
    if match is None:
        return teacher
    if teacher in match:
        return match[teacher]
    group = group_of(teacher)
    return match[group] + teacher.removeprefix(group) if group in match else None
