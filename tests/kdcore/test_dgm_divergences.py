"""Divergences of conditionals: against torch, sums and transport; finite where torch's are not."""

from __future__ import annotations

import ot
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    StudentT,
    kl_divergence,
)

from kdcore.dgm.divergences import DivergenceName, divergence, register_divergence
from kdcore.dgm.families import Delta
from kdcore.dgm.softplus import softplus


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def laws(kind: str) -> tuple[Distribution, Distribution]:
    first, second = random(2, 4, 3)
    if kind == "normal":
        return Normal(first, random(4, 3).exp()), Normal(second, random(4, 3).exp())
    if kind == "laplace":
        return Laplace(first, random(4, 3).exp()), Laplace(second, random(4, 3).exp())
    if kind == "full":
        roots = random(2, 4, 3, 3).tril(-1) + torch.eye(3).double()
        return MultivariateNormal(first, scale_tril=roots[0]), MultivariateNormal(
            second, scale_tril=roots[1]
        )
    made = {"bits": Bernoulli, "class": Categorical, "one_hot": OneHotCategorical}[kind]
    return made(logits=first), made(logits=second)


@pytest.mark.parametrize("kind", ["normal", "laplace", "full", "bits", "class", "one_hot"])
def test_kl_is_torchs_where_that_is_finite(kind: str) -> None:
    p, q = laws(kind)
    torch.testing.assert_close(divergence("kl", p, q), kl_divergence(p, q))
    same = divergence("kl", p, p)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["normal", "bits", "class", "one_hot", "laplace", "full"])
def test_cross_entropy_is_kl_and_the_teachers_entropy(kind: str) -> None:
    p, q = laws(kind)
    torch.testing.assert_close(divergence("cross_entropy", p, q), kl_divergence(p, q) + p.entropy())


def test_kl_of_bits_stays_finite_with_a_gradient_where_torchs_is_lost() -> None:
    logits = torch.tensor([17.0, 40.0, -40.0], requires_grad=True)
    teacher = Bernoulli(logits=torch.zeros(3))
    assert bool(kl_divergence(teacher, Bernoulli(logits=logits)).isinf().any())
    value = divergence("kl", teacher, Bernoulli(logits=logits))
    exact = divergence(
        "kl", Bernoulli(logits=torch.zeros(3).double()), Bernoulli(logits=logits.double())
    )
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(gradient, logits.detach().sigmoid() - 0.5)


def test_our_softplus_is_torchs_with_its_gradient() -> None:
    x = torch.tensor([-800.0, -40, -3, 0, 0.5, 3, 40, 800]).double().requires_grad_()
    torch.testing.assert_close(softplus(x), F.softplus(x, threshold=40), rtol=0, atol=1e-15)
    (gradient,) = torch.autograd.grad(softplus(x).sum(), x)
    torch.testing.assert_close(gradient, x.detach().sigmoid(), rtol=1e-15, atol=0)
    torch.testing.assert_close(
        softplus(x.float()).double(), softplus(x.float().double()), rtol=1e-7, atol=2e-7
    )
    assert torch.autograd.gradcheck(softplus, (random(3, 4).requires_grad_(),))


def test_kl_of_classes_stays_finite_with_a_gradient_where_torchs_is_lost() -> None:
    logits = torch.tensor([[0.0, 110.0]], requires_grad=True)
    teacher = Categorical(logits=torch.zeros(1, 2))
    assert bool(kl_divergence(teacher, Categorical(logits=logits)).isinf())
    value = divergence("kl", teacher, Categorical(logits=logits))
    torch.testing.assert_close(value.detach(), torch.tensor([55 - 0.6931472]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.5]]))


def test_a_class_that_both_exclude_counts_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    teacher = Categorical(logits=torch.tensor([[1.0, 0.0, -torch.inf]]))
    kept = kl_divergence(
        Categorical(logits=teacher.logits[:, :2]), Categorical(logits=logits[:, :2])
    )
    for name in ("kl", "cross_entropy"):
        value = divergence(name, teacher, Categorical(logits=logits))  # type: ignore[arg-type]
        assert bool(value.isfinite().all())
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert bool(gradient.isfinite().all())
    torch.testing.assert_close(divergence("kl", teacher, Categorical(logits=logits)), kept)


@pytest.mark.parametrize("kind", ["normal", "full"])
def test_squared_w2_of_gaussians_is_that_of_bures(kind: str) -> None:
    p, q = laws(kind)
    value = divergence("squared_w2", p, q)
    total = value.sum(1) if kind == "normal" else value
    for row in range(4):
        moments = [
            (law.mean[row].numpy(), held[row].numpy())
            for law, held in ((p, covariance(p)), (q, covariance(q)))
        ]
        (m_p, c_p), (m_q, c_q) = moments
        expected = ot.gaussian.bures_wasserstein_distance(m_p, m_q, c_p, c_q) ** 2
        torch.testing.assert_close(float(total[row]), float(expected), rtol=1e-6, atol=1e-9)


def covariance(law: Distribution) -> Tensor:
    if isinstance(law, MultivariateNormal):
        return law.covariance_matrix
    return torch.diag_embed(law.variance)


@pytest.mark.parametrize("kind", ["bits", "one_hot"])
def test_squared_w2_of_discrete_values_is_that_of_their_best_plan(kind: str) -> None:
    p, q = laws(kind)
    value = divergence("squared_w2", p, q)
    if kind == "bits":
        points = torch.tensor([[0.0], [1.0]]).double()
        masses = [torch.stack([1 - law.mean, law.mean], -1).reshape(-1, 2) for law in (p, q)]
    else:
        points, masses = torch.eye(3).double(), [law.mean for law in (p, q)]
    cost = torch.cdist(points, points).square()
    for found, a, b in zip(value.flatten(), *masses, strict=True):
        expected = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
        torch.testing.assert_close(float(found), float(expected), rtol=1e-9, atol=1e-12)


def test_deterministic_variables_differ_by_their_squares_but_never_by_kl() -> None:
    p, q = Delta(random(4, 3)), Delta(random(4, 3))
    expected = (p.value - q.value) ** 2
    torch.testing.assert_close(divergence("squared_w2", p, q), expected)
    for name in ("kl", "cross_entropy"):
        with pytest.raises(ValueError, match="infinite; use 'squared_w2'"):
            divergence(name, p, q)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [
        ("kl", "normal", "bits"),
        ("squared_w2", "class", "class"),
        ("squared_w2", "laplace", "laplace"),
    ],
)
def test_a_pair_without_a_closed_form_is_refused(
    name: DivergenceName, teacher: str, student: str
) -> None:
    p, q = laws(teacher)[0], laws(student)[1]
    with pytest.raises(TypeError, match="add one with register_divergence"):
        divergence(name, p, q)


def test_a_divergence_is_registered_once() -> None:
    class Heavy(StudentT):
        pass

    @register_divergence("squared_w2", Heavy, Heavy)
    def _of_location(p: Heavy, q: Heavy) -> Tensor:
        return (p.loc - q.loc).square()

    p, q = (Heavy(torch.full((2,), 5.0), torch.full((2,), loc)) for loc in (1.0, 3.0))
    torch.testing.assert_close(divergence("squared_w2", p, q), torch.full((2,), 4.0))
    with pytest.raises(ValueError, match="registered already"):
        register_divergence("squared_w2", Heavy, Heavy)


def test_independent_dimensions_are_compared_one_by_one() -> None:
    p, q = laws("normal")
    wrapped = Independent(p, 1), Independent(q, 1)
    torch.testing.assert_close(divergence("kl", *wrapped), divergence("kl", p, q))


@pytest.mark.parametrize("kind", ["normal", "bits", "one_hot", "full"])
@pytest.mark.parametrize("name", ["kl", "cross_entropy", "squared_w2"])
def test_every_divergence_has_the_gradient_of_its_finite_differences(
    name: DivergenceName, kind: str
) -> None:
    p, _ = laws(kind)
    start = random(2, 4, 3)
    root = torch.eye(3).double() + 0.3 * random(3, 3).tril(-1)

    def value(first: Tensor, second: Tensor) -> Tensor:
        if kind == "normal":
            return divergence(name, p, Normal(first, second.exp()))
        if kind == "full":
            return divergence(name, p, MultivariateNormal(first, scale_tril=root))
        made = Bernoulli if kind == "bits" else OneHotCategorical
        return divergence(name, p, made(logits=first))

    inputs = [held.clone().requires_grad_() for held in start]
    if kind != "normal":
        inputs[1].requires_grad_(False)
    assert torch.autograd.gradcheck(value, inputs)


def test_kl_of_bits_is_jointly_convex() -> None:
    p, q = torch.rand(2, 2, 500).double()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return divergence("kl", Bernoulli(probs=a), Bernoulli(probs=b))

    for share in (0.25, 0.5):
        mixed = kl(*(share * held[0] + (1 - share) * held[1] for held in (p, q)))
        apart = share * kl(p[0], q[0]) + (1 - share) * kl(p[1], q[1])
        assert bool((mixed <= apart + 1e-12).all())
