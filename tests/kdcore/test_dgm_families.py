"""Noise becomes the distribution it is pushed to, with the gradients that it should have."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Exponential,
    Gumbel,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    StudentT,
)

from kdcore.dgm.families import (
    Delta,
    Family,
    draw_noise,
    family_of,
    parameters_of,
    push,
    register_family,
)

MANY = 20_000


def number(value: float) -> Tensor:
    return torch.full((MANY,), value, dtype=torch.float64)


CONTINUOUS = {
    "normal": (Normal(number(0.3), number(1.7)), scipy.stats.norm(0.3, 1.7)),
    "laplace": (Laplace(number(0.3), number(1.7)), scipy.stats.laplace(0.3, 1.7)),
    "gumbel": (Gumbel(number(0.3), number(1.7)), scipy.stats.gumbel_r(0.3, 1.7)),
    "log_normal": (
        LogNormal(number(0.3), number(0.7)),
        scipy.stats.lognorm(0.7, scale=2**0.432808),
    ),
    "exponential": (Exponential(number(2.0)), scipy.stats.expon(scale=0.5)),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_noise_becomes_the_continuous_distribution(name: str) -> None:
    law, oracle = CONTINUOUS[name]
    value = push(law, draw_noise(law, None))
    assert scipy.stats.kstest(value.numpy(), oracle.cdf).pvalue > 1e-3


def test_noise_becomes_the_gaussian_of_full_covariance() -> None:
    root = torch.tensor([[1.0, 0.0], [0.8, 0.5]]).double()
    law = MultivariateNormal(torch.tensor([1.0, -2.0]).double().expand(MANY, 2), scale_tril=root)
    value = push(law, draw_noise(law, None))
    torch.testing.assert_close(torch.cov(value.T), root @ root.T, rtol=0.05, atol=0.02)
    torch.testing.assert_close(value.mean(0), law.loc[0], rtol=0, atol=0.03)


@pytest.mark.parametrize("kind", [Categorical, OneHotCategorical])
def test_noise_becomes_each_class_as_often_as_it_is_likely(kind: type[Distribution]) -> None:
    probability = torch.tensor([0.1, 0.2, 0.7]).double()
    law = kind(probs=probability.expand(MANY, 3))  # type: ignore[call-arg]
    value = push(law, draw_noise(law, None))
    hot = torch.nn.functional.one_hot(value, 3) if kind is Categorical else value
    torch.testing.assert_close(hot.double().mean(0), probability, rtol=0, atol=0.015)


def test_noise_becomes_each_bit_as_often_as_it_is_likely() -> None:
    law = Bernoulli(probs=torch.tensor([0.1, 0.8]).double().expand(MANY, 2))
    value = push(law, draw_noise(law, None))
    torch.testing.assert_close(value.mean(0), law.probs[0], rtol=0, atol=0.015)


def test_the_gradient_of_a_continuous_value_is_that_of_its_formula() -> None:
    noise = torch.rand(3).double()
    parameters = [torch.randn(3).double().requires_grad_(), (torch.rand(3).double() + 1)]
    parameters[1].requires_grad_()
    for kind in (Normal, Laplace, Gumbel):
        assert torch.autograd.gradcheck(
            lambda loc, scale, kind=kind: push(kind(loc, scale), noise), parameters
        )


@pytest.mark.parametrize("kind", [Bernoulli, OneHotCategorical])
def test_a_discrete_value_has_the_gradient_of_its_probability_if_asked(
    kind: type[Distribution],
) -> None:
    logits = torch.randn(4, 3).double().requires_grad_()
    law = kind(logits=logits)  # type: ignore[call-arg]
    noise = draw_noise(law, None)
    plain, through = (push(law, noise, gradient=way) for way in ("none", "straight_through"))  # type: ignore[arg-type]
    assert not plain.requires_grad
    torch.testing.assert_close(through.detach(), plain, rtol=0, atol=0)
    weight = torch.randn(4, 3).double()
    (found,) = torch.autograd.grad((weight * through).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((weight * law.mean).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_the_noise_is_that_of_its_generator_and_of_the_parameters_type() -> None:
    for law in (Normal(torch.zeros(5), torch.ones(5)), Bernoulli(logits=torch.zeros(5).double())):
        first, again = (draw_noise(law, torch.Generator().manual_seed(3)) for _ in range(2))
        assert first is not None
        assert first.dtype is parameters_of(law).popitem()[1].dtype
        torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_a_deterministic_variable_has_no_noise_and_is_its_value() -> None:
    value = torch.randn(2, 3, requires_grad=True)
    assert draw_noise(Delta(value), None) is None
    assert push(Delta(value), None) is value
    assert Delta(value[:1]).expand((4, 3)).mean.shape == (4, 3)


@pytest.mark.parametrize(
    "law", [Beta(number(1.0), number(2.0)), StudentT(number(4.0))], ids=["beta", "student_t"]
)
def test_a_distribution_without_a_way_from_noise_is_refused(law: Distribution) -> None:
    with pytest.raises(TypeError, match=r"make .* of noise: it has no icdf"):
        family_of(law)


def test_noise_that_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="Normal needs noise"):
        push(Normal(torch.zeros(2), torch.ones(2)), None)


def test_a_family_is_registered_once() -> None:
    class Shifted(Laplace):
        pass

    family = Family(("loc", "scale"), "normal", lambda law, noise, gradient: law.loc + noise)
    register_family(Shifted, family)
    law = Shifted(torch.ones(3), torch.ones(3))
    torch.testing.assert_close(push(law, torch.full((3,), 2.0)), torch.full((3,), 3.0))
    with pytest.raises(ValueError, match="Shifted already has a family"):
        register_family(Shifted, family)


def test_the_inside_of_independent_dimensions_has_the_family() -> None:
    law = Independent(Normal(torch.zeros(4, 2), torch.ones(4, 2)), 1)
    assert set(parameters_of(law.base_dist)) == {"loc", "scale"}
