"""Distances between the Gaussians that have the moments of two samples."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.checks import check_same_width
from kdcore.metrics.classes import Reduction, reduced, shared_classes
from kdcore.metrics.moments import Covariance, Gaussians, fit, fit_classes
from kdcore.metrics.nuclear import nuclear_norm_of_product

Direction = Literal["forward", "reverse", "jeffreys"]


def gaussian_wasserstein(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    *,
    covariance: Covariance = "diagonal",
    ridge: float = 0.0,
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance between the Gaussians with the moments of two samples.

    .. math:: \|\mu_S - \mu_T\|^2 + \mathrm{Tr}\big( \Sigma_S + \Sigma_T
        - 2 (\Sigma_S^{1/2} \Sigma_T \Sigma_S^{1/2})^{1/2} \big)

    With ``covariance="diagonal"``, :math:`\|\mu_S - \mu_T\|^2 + \|\sigma_S - \sigma_T\|^2`, which
    is never larger; a dead column has standard deviation 0 and gets no gradient from it. The full
    one needs no inverse, so fewer rows than columns are as good; ``ridge`` is added to the diagonal
    of both covariances and only there for comparison. Covariances are divided by n.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, the rows W2(G), which are diagonal; the full
    one is Gelbrich 1990 through the nuclear norm of the cross-Gram matrix.
    """
    check_same_width(student, teacher)
    shares = fit(student, covariance, ridge), fit(teacher, covariance, ridge)
    return _squared_wasserstein(*shares, covariance)


def gaussian_kl(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    *,
    covariance: Covariance = "diagonal",
    direction: Direction = "forward",
    eps: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    r"""Kullback-Leibler divergence between the Gaussians with the moments of two samples.

    .. math:: \tfrac12 \Big[ \mathrm{Tr}(\Sigma_T^{-1} \Sigma_S) + (\mu_T - \mu_S)^\top
        \Sigma_T^{-1} (\mu_T - \mu_S) - d + \log \frac{\det \Sigma_T}{\det \Sigma_S} \Big]

    "forward" is KL(student || teacher), the paper's; "jeffreys" is half the sum of both. ``eps`` is
    added to every variance of both: without it a dead column or fewer rows than columns give
    infinity, and with fewer rows than columns the value grows as 1/eps.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, the row KL(G), which is diagonal and adds 1e-9
    to one of two standard deviations, so that a dead unit gives minus infinity.
    """
    check_same_width(student, teacher)
    here, there = fit(student, covariance), fit(teacher, covariance)
    return _directed(here, there, covariance, direction, eps)


def class_gaussian_wasserstein(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    student_label: Int[Tensor, " n"],
    teacher_label: Int[Tensor, " m"],
    *,
    covariance: Covariance = "diagonal",
    shrinkage: float = 0.0,
    reduction: Reduction = "frequency",
    num_classes: int | None = None,
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance between the Gaussians of each class.

    .. math:: v_c = W_2^2\big( N(\mu_{S|c}, \tilde\Sigma_{S|c}), N(\mu_{T|c}, \tilde\Sigma_{T|c})
        \big), \quad \tilde\Sigma_c = (1 - \alpha) \Sigma_c + \alpha \sum_{c'} \tfrac{n_{c'}}{n}
        \Sigma_{c'}

    with :math:`\alpha` the ``shrinkage``. A class of one sample has its distance of means. Each
    sample is shrunk towards its own pooled covariance.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, the row CW2(G), which is diagonal, unshrunk,
    divided by the number of classes in print and summed in code.
    """
    check_same_width(student, teacher)
    classes = shared_classes(student_label, teacher_label)
    here = fit_classes(student, classes.student, classes.num, covariance, shrinkage)
    there = fit_classes(teacher, classes.teacher, classes.num, covariance, shrinkage)
    values = _squared_wasserstein(here, there, covariance)
    return reduced(values, classes, reduction=reduction, num_classes=num_classes)


def class_gaussian_kl(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    student_label: Int[Tensor, " n"],
    teacher_label: Int[Tensor, " m"],
    *,
    covariance: Covariance = "diagonal",
    direction: Direction = "forward",
    eps: float | Float[Tensor, ""],
    shrinkage: float = 0.0,
    reduction: Reduction = "frequency",
    num_classes: int | None = None,
) -> Float[Tensor, ""]:
    r"""Kullback-Leibler divergence between the Gaussians of each class.

    .. math:: v_c = \mathrm{KL}\big( N(\mu_{S|c}, \tilde\Sigma_{S|c} + \epsilon I) \,\|\,
        N(\mu_{T|c}, \tilde\Sigma_{T|c} + \epsilon I) \big)

    Shrinkage as in ``class_gaussian_wasserstein``, directions as in ``gaussian_kl``. A class of one
    sample has no covariance of its own: without shrinkage ``eps`` alone decides its value.

    Source: Montesuma 2025 (KD2M), arXiv:2504.01757, whose code has it diagonal and unreachable.
    """
    check_same_width(student, teacher)
    classes = shared_classes(student_label, teacher_label)
    here = fit_classes(student, classes.student, classes.num, covariance, shrinkage)
    there = fit_classes(teacher, classes.teacher, classes.num, covariance, shrinkage)
    values = _directed(here, there, covariance, direction, eps)
    return reduced(values, classes, reduction=reduction, num_classes=num_classes)


def _squared_wasserstein(p: Gaussians, q: Gaussians, covariance: Covariance) -> Tensor:
    between_means = (p.mean - q.mean).square().sum(dim=-1)
    if covariance == "diagonal":
        return between_means + (_root(p.spread) - _root(q.spread)).square().sum(dim=-1)
    traces = p.spread.square().sum(dim=(-2, -1)) + q.spread.square().sum(dim=(-2, -1))
    return between_means + traces - 2 * nuclear_norm_of_product(p.spread, q.spread)


def _root(x: Tensor) -> Tensor:
    """Square root with slope 0, not infinity, at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _directed(
    p: Gaussians, q: Gaussians, covariance: Covariance, direction: Direction, eps: float | Tensor
) -> Tensor:
    divergence = _diagonal_kl if covariance == "diagonal" else _full_kl
    if direction == "forward":
        return divergence(p, q, eps)
    if direction == "reverse":
        return divergence(q, p, eps)
    return (divergence(p, q, eps) + divergence(q, p, eps)) / 2


def _diagonal_kl(p: Gaussians, q: Gaussians, eps: float | Tensor) -> Tensor:
    here, there = p.spread + eps, q.spread + eps
    squared = (q.mean - p.mean).square()
    return ((here + squared) / there - 1 + there.log() - here.log()).sum(dim=-1) / 2


def _full_kl(p: Gaussians, q: Gaussians, eps: float | Tensor) -> Tensor:
    shift = (q.mean - p.mean).unsqueeze(-2)
    width = shift.shape[-1]
    if max(p.spread.shape[-2], q.spread.shape[-2]) < width:
        return _full_kl_of_few_rows(p.spread, q.spread, shift, eps)
    identity = torch.eye(width, dtype=shift.dtype, device=shift.device)
    here = torch.linalg.cholesky(p.spread.mT @ p.spread + eps * identity)
    there = torch.linalg.cholesky(q.spread.mT @ q.spread + eps * identity)
    solved = torch.linalg.solve_triangular(there, torch.cat([here, shift.mT], dim=-1), upper=False)
    trace_and_shift = solved.square().sum(dim=(-2, -1))
    divergence: Tensor = (trace_and_shift - width + _log_det(there) - _log_det(here)) / 2
    return divergence


def _full_kl_of_few_rows(a: Tensor, b: Tensor, shift: Tensor, eps: float | Tensor) -> Tensor:
    """By the Woodbury identity: with B B^T of the teacher's m rows in the place of d x d."""
    n, m = a.shape[-2], b.shape[-2]
    small = torch.eye(m, dtype=b.dtype, device=b.device)
    here = torch.linalg.cholesky(a @ a.mT + eps * torch.eye(n, dtype=a.dtype, device=a.device))
    there = torch.linalg.cholesky(b @ b.mT + eps * small)
    rows = torch.cat([a, shift], dim=-2)  # Tr(Q^-1 A^T A) and the shift's form are one sum
    whitened = torch.linalg.solve_triangular(
        there, torch.cat([b @ rows.mT, small.expand(*b.shape[:-1], m)], dim=-1), upper=False
    )
    explained = whitened[..., : n + 1].square().sum(dim=(-2, -1))
    inverse_trace = whitened[..., n + 1 :].square().sum(dim=(-2, -1))
    outside = (rows.square().sum(dim=(-2, -1)) - explained) / eps
    log_eps = torch.as_tensor(eps, dtype=a.dtype, device=a.device).log()
    log_dets = _log_det(there) - _log_det(here) + (n - m) * log_eps
    divergence: Tensor = (outside + eps * inverse_trace - m + log_dets) / 2
    return divergence


def _log_det(cholesky: Tensor) -> Tensor:
    return 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
