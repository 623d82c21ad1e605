"""Training without a teacher: the bound, wake and sleep, and what is kept of an old condition."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from kdcore.dgm.continual import ContinualStep
from kdcore.dgm.distiller import DGMDistiller
from kdcore.dgm.marginals import log_marginal
from kdcore.dgm.models.helmholtz import helmholtz_generator, helmholtz_recognition
from kdcore.dgm.models.ladder import Ladder
from kdcore.dgm.models.ladder_vae import LadderVAE
from kdcore.dgm.objective import Objective
from kdcore.dgm.trace import Trace
from kdcore.dgm.variational import (
    Inferred,
    NegativeElbo,
    Variational,
    WakeSleep,
    negative_elbo,
)
from kdcore.schedules import Warmup


class Loadings(nn.Module):
    """y = C z + xi / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.randn(3, 2).double()

    def forward(self, run: Trace) -> None:
        zero = torch.zeros(run.num_rows, 2).double()
        z = run.latent("z", MultivariateNormal(zero, torch.eye(2).double()))
        mean = z @ self.matrix.T
        run.target("y", Normal(mean, torch.full_like(mean, 0.5)))


class FactorAnalysis(Variational):
    """A linear model with its exact posterior, from which ``shift`` departs."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.generator = Loadings()
        self.matrix, self.shift = self.generator.matrix, shift
        self.covariance = (torch.eye(2).double() + 4 * self.matrix.T @ self.matrix).inverse()

    def infer(
        self,
        observed: Mapping[str, Tensor],
        *,
        inputs: Mapping[str, Tensor] = {},
        noise: torch.Generator | None = None,
    ) -> Inferred:
        mean = 4 * observed["y"] @ self.matrix @ self.covariance + self.shift
        posterior = Trace(len(mean), generator=noise)
        z = posterior.latent("z", MultivariateNormal(mean, self.covariance))
        joint = Trace(len(mean), values={"z": z, **observed})
        self.generator(joint)
        return Inferred(posterior, joint)

    def log_density(self, y: Tensor) -> Tensor:
        covariance = self.matrix @ self.matrix.T + torch.eye(3).double() / 4
        return MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(y)


def test_the_bound_is_the_likelihood_at_the_exact_posterior() -> None:
    model, y = FactorAnalysis(), torch.randn(4, 3).double()
    rows = y.repeat(50_000, 1)
    expected = -model.log_density(y).mean()
    value = negative_elbo(model.infer({"y": rows}))
    torch.testing.assert_close(value.loss, expected, rtol=0.005, atol=0)
    torch.testing.assert_close(value.loss, value.reconstruction + value.kl["z"])
    torch.manual_seed(0)
    away = FactorAnalysis(shift=0.4)
    assert float(negative_elbo(away.infer({"y": rows})).loss) > float(expected) * 1.02


def test_the_divergence_may_be_warmed_up() -> None:
    model, observed = FactorAnalysis(), {"y": torch.randn(4, 3).double()}

    def at(epoch: float) -> tuple[Tensor, Tensor, Tensor]:
        step = NegativeElbo(model, kl_weight=Warmup(1.0, 25.0))
        value = step(observed, epoch=epoch, noise=torch.Generator().manual_seed(1))
        return value.loss, value.reconstruction, value.kl["z"]

    for epoch, weight in ((0.0, 0.0), (5.0, 0.2), (25.0, 1.0), (40.0, 1.0)):
        loss, reconstruction, kl = at(epoch)
        torch.testing.assert_close(loss, reconstruction + weight * kl)


def tiny(num_conditions: int = 0) -> LadderVAE:
    return LadderVAE(Ladder(4, 8, (4, 2, 1), image_channels=1, num_conditions=num_conditions))


def test_the_bound_trains_every_parameter_of_a_ladder_and_falls() -> None:
    model, image = tiny(), torch.rand(8, 1, 8, 8)
    step = NegativeElbo(model).train()
    optimizer = torch.optim.Adam(step.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = step({"y": image}).loss
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(parameter.grad is not None for parameter in step.parameters())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_wake_trains_the_generator_and_sleep_the_recognition() -> None:
    step = WakeSleep(helmholtz_generator(4), helmholtz_recognition(4))
    observed = {"y1": torch.randn(8, 1), "y2": torch.randn(8, 1)}
    step.wake(observed, 8, noise=None).backward()
    assert all(parameter.grad is not None for parameter in step.generator.parameters())
    assert all(parameter.grad is None for parameter in step.recognition.parameters())
    step.generator.zero_grad()
    step.sleep(8, noise=None).backward()
    assert all(parameter.grad is None for parameter in step.generator.parameters())
    assert all(parameter.grad is not None for parameter in step.recognition.parameters())


def test_wake_and_sleep_raise_the_exact_likelihood() -> None:
    step = WakeSleep(helmholtz_generator(8), helmholtz_recognition(8))
    first = torch.randint(2, (200, 1)).float() * 2 - 1
    observed = {"y2": first + 0.3 * torch.randn(200, 1), "y1": first + 0.3 * torch.randn(200, 1)}

    def likelihood() -> float:
        with torch.no_grad():
            return float(log_marginal(step.generator, observed, 200, inputs={}).mean())

    before = likelihood()
    optimizer = torch.optim.Adam(step.parameters(), lr=2e-2)
    for _ in range(150):
        optimizer.zero_grad()
        step(observed).backward()
        optimizer.step()
    # two independent Gaussians of the data's moments would have -2.9
    assert likelihood() > max(before + 0.3, -2.6)


def condition(index: int, rows: int = 6) -> Tensor:
    return torch.eye(2)[[index] * rows]


@pytest.mark.parametrize("replay", ["distilled", "generated"])
def test_the_continual_loss_is_its_formula(replay: str) -> None:
    model, image = tiny(2).eval(), torch.rand(6, 1, 8, 8)
    teacher = copy.deepcopy(model.generator)
    step = ContinualStep(
        model,
        Objective(),
        num_conditions=2,
        old=0,
        new=1,
        new_share=0.2,
        old_weight=1.5,
        replay=replay,  # type: ignore[arg-type]
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    loss = step(image, noise=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(1)
    new = negative_elbo(model.infer({"y": image}, inputs={"condition": condition(1)}, noise=noise))
    old_inputs = {"condition": condition(0)}
    distiller = DGMDistiller(teacher, model.generator, Objective()).eval()
    if replay == "distilled":
        old = distiller(6, inputs=old_inputs, generator=noise).loss
    else:
        dream = distiller.run_teacher(6, inputs=old_inputs, generator=noise).values("target")
        old = negative_elbo(model.infer(dream, inputs=old_inputs, noise=noise)).loss
    torch.testing.assert_close(loss, (0.8 * 1.5 * old + 0.2 * new.loss) / 2)


def test_what_is_remembered_does_not_learn_and_the_rest_does() -> None:
    model = tiny(2)
    step = ContinualStep(model, Objective(), num_conditions=2, old=0, new=1, new_share=0.5).train()
    before = copy.deepcopy(model.generator.state_dict())
    trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == {id(p) for p in model.parameters()}
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    step(torch.rand(6, 1, 8, 8)).backward()
    assert all(parameter.grad is not None for parameter in trained)
    optimizer.step()
    remembered: nn.Module = step.get_submodule("_remembered.teacher")
    torch.testing.assert_close(remembered.state_dict(), before, rtol=0, atol=0)
