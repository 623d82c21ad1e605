"""The nuclear norm of a product, with its exact gradient at singular products."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def nuclear_norm_of_product(
    left: Float[Tensor, "*c n d"], right: Float[Tensor, "*c m d"]
) -> Float[Tensor, "*c"]:
    r"""Sum of the singular values of :math:`A B^\top`: the cross term of the Bures distance.

    .. math:: \| A B^\top \|_* = \mathrm{Tr}\big( (\Sigma_A^{1/2} \Sigma_B \Sigma_A^{1/2})^{1/2}
        \big), \quad \Sigma_A = A^\top A, \ \Sigma_B = B^\top B

    The gradient with respect to A is :math:`U V^\top B` over the pairs of singular vectors whose
    value is not zero up to rounding, and neither divides by singular values nor by their gaps, as
    autograd of ``sqrtm``, ``eigh`` or ``svd`` would. Where d is the smallest size, the decomposed
    matrix is the d x d one of the triangular factors. Differentiable once.
    """
    value: Tensor = _NuclearNormOfProduct.apply(left, right)
    return value


class _NuclearNormOfProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        tall = left.shape[-1] < min(left.shape[-2], right.shape[-2])
        if tall:
            left_basis, left_core = torch.linalg.qr(left)
            right_basis, right_core = torch.linalg.qr(right)
        else:
            left_core, right_core = left, right
        u, s, vh = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
        size = max(left_core.shape[-2], right_core.shape[-2])
        largest = s.amax(dim=-1, keepdim=True)
        kept = s > size * torch.finfo(s.dtype).eps * largest
        polar = (u * kept.unsqueeze(-2)) @ vh
        to_left, to_right = polar @ right_core, polar.mT @ left_core
        if tall:
            to_left, to_right = left_basis @ to_left, right_basis @ to_right
        ctx.save_for_backward(to_left, to_right)
        value: Tensor = s.sum(dim=-1)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        to_left, to_right = ctx.saved_tensors
        scale = gradient[..., None, None]
        return scale * to_left, scale * to_right
