r"""Divergences :math:`d(p_T, p_S)` between the conditionals of one variable, teacher first.

Each is the exact value of every single variable, shape (B, ...): what is summed or averaged is the
caller's choice. All but cross-entropy are jointly convex, so that the mean over shared noise bounds
the divergence of the marginals; W2 without its square is not, and has no place here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    kl_divergence,
)

from kdcore.dgm.families import Delta, innermost
from kdcore.dgm.softplus import softplus
from kdcore.metrics.nuclear import nuclear_norm_of_product

DivergenceName = Literal["kl", "cross_entropy", "squared_w2"]
Divergence = Callable[[Any, Any], Tensor]
D = TypeVar("D", bound=Divergence)


def register_divergence(
    name: DivergenceName, teacher: type[Distribution], student: type[Distribution]
) -> Callable[[D], D]:
    """Let a function be the divergence between two types of distributions.

    It must be jointly convex, which nobody checks. Raises ValueError for a pair that has one.
    """
    if (name, teacher, student) in _DIVERGENCES:
        raise ValueError(
            f"{name} between {teacher.__name__} and {student.__name__} is registered already"
        )

    def register(function: D) -> D:
        _DIVERGENCES[name, teacher, student] = function
        return function

    return register


def divergence(
    name: DivergenceName, teacher: Distribution, student: Distribution
) -> Float[Tensor, "b ..."]:
    r"""The named divergence of every variable, in closed form.

    .. math:: \mathrm{KL}(p \| q) = E_p \log \frac{p}{q}, \quad
        H(p, q) = -E_p \log q, \quad
        W_2^2(p, q) = \inf_{\gamma \in \Gamma(p, q)} E_\gamma \|a - b\|^2

    The Kullback-Leibler divergence of discrete variables is taken from logits: torch's own becomes
    infinite, without a gradient, at a student's logit of 17 in float32. Cross-entropy differs from
    it by the teacher's entropy, so subtract that before comparing with a divergence of marginals;
    that with a ``Delta`` is the negative log-likelihood of its value.

    Raises TypeError for a pair without a closed form, ValueError where it would be infinite.

    Source: Chen et al. 2023, "Knowledge distillation for deep directed graphical models", CVPR.
    """
    p, q = innermost(teacher), innermost(student)
    known = _DIVERGENCES.get((name, type(p), type(q)))
    if known is not None:
        return known(p, q)
    if name == "kl":
        return _kl_of_torch(p, q)
    if name == "cross_entropy" and isinstance(p, Delta) and not isinstance(q, Delta):
        return -q.log_prob(p.value)
    if name == "cross_entropy":
        return divergence("kl", p, q) + p.entropy()
    raise TypeError(_no_closed_form(name, p, q))


def _kl_of_torch(p: Distribution, q: Distribution) -> Tensor:
    if isinstance(p, Delta) and isinstance(q, Delta):
        raise ValueError(
            "the Kullback-Leibler divergence between two deterministic variables is infinite; "
            "use 'squared_w2', which is their squared difference"
        )
    try:
        return kl_divergence(p, q)
    except NotImplementedError:
        raise TypeError(_no_closed_form("kl", p, q)) from None


def _no_closed_form(name: str, p: Distribution, q: Distribution) -> str:
    return (
        f"no closed form of {name!r} is known between the teacher's {type(p).__name__} and the "
        f"student's {type(q).__name__}; add one with register_divergence"
    )


def _kl_normal(p: Normal, q: Normal) -> Tensor:
    ratio = p.scale / q.scale
    shift = (p.loc - q.loc) / q.scale
    of_scales = torch.addcmul(-0.5 - ratio.log(), ratio, ratio, value=0.5)
    return torch.addcmul(of_scales, shift, shift, value=0.5)


def _kl_bernoulli(p: Bernoulli, q: Bernoulli) -> Tensor:
    of_zero = softplus(q.logits) - softplus(p.logits)
    return torch.addcmul(of_zero, torch.sigmoid(p.logits), p.logits - q.logits)


def _kl_categorical(p: Any, q: Any) -> Tensor:
    # an impossible class has the logit -inf in both, whose difference is no number
    gap = torch.where(p.probs > 0, p.logits - q.logits, 0.0)
    total: Tensor = (p.probs * gap).sum(dim=-1)
    return total


def _cross_entropy_bernoulli(p: Bernoulli, q: Bernoulli) -> Tensor:
    return torch.addcmul(softplus(q.logits), p.probs, q.logits, value=-1)


def _cross_entropy_categorical(p: Any, q: Any) -> Tensor:
    total: Tensor = -(p.probs * torch.where(p.probs > 0, q.logits, 0.0)).sum(dim=-1)
    return total


def _cross_entropy_normal(p: Normal, q: Normal) -> Tensor:
    error = (p.loc - q.loc).square() + p.scale.square()
    return error / (2 * q.scale.square()) + q.scale.log() + math.log(2 * math.pi) / 2


def _squared_w2_normal(p: Normal, q: Normal) -> Tensor:
    return (p.loc - q.loc).square() + (p.scale - q.scale).square()


def _squared_w2_multivariate_normal(p: MultivariateNormal, q: MultivariateNormal) -> Tensor:
    here, there = q.scale_tril, p.scale_tril
    traces = here.square().sum(dim=(-2, -1)) + there.square().sum(dim=(-2, -1))
    cross = 2 * nuclear_norm_of_product(here.mT, there.mT)
    return (p.loc - q.loc).square().sum(dim=-1) + traces - cross


_DIVERGENCES: dict[tuple[DivergenceName, type[Distribution], type[Distribution]], Divergence] = {
    ("kl", Normal, Normal): _kl_normal,
    ("kl", Bernoulli, Bernoulli): _kl_bernoulli,
    ("kl", Categorical, Categorical): _kl_categorical,
    ("kl", OneHotCategorical, OneHotCategorical): _kl_categorical,
    ("cross_entropy", Bernoulli, Bernoulli): _cross_entropy_bernoulli,
    ("cross_entropy", Categorical, Categorical): _cross_entropy_categorical,
    ("cross_entropy", OneHotCategorical, OneHotCategorical): _cross_entropy_categorical,
    ("cross_entropy", Normal, Normal): _cross_entropy_normal,
    ("squared_w2", Normal, Normal): _squared_w2_normal,
    ("squared_w2", Delta, Delta): lambda p, q: (p.value - q.value).square(),
    ("squared_w2", Bernoulli, Bernoulli): lambda p, q: (p.probs - q.probs).abs(),
    # one-hot vectors that differ are at a squared distance of 2
    ("squared_w2", OneHotCategorical, OneHotCategorical): lambda p, q: (
        (p.probs - q.probs).abs().sum(dim=-1)
    ),
    ("squared_w2", MultivariateNormal, MultivariateNormal): _squared_w2_multivariate_normal,
}
