"""What a step costs: by loops, by scipy, by the expectation over every sign of the noise."""

from __future__ import annotations

import math
from itertools import product

import pytest
import scipy.stats
import torch
from torch import Tensor

from kdcore.kdiffusion.likelihood import (
    Reading,
    Spread,
    Walk,
    gaussian_nll,
    rollout,
    rollout_error,
    trajectory_error,
    x0_error,
)
from kdcore.kdiffusion.schedule import ReverseSteps, reverse_steps, signal_gain, transition

READINGS: tuple[Reading, ...] = ("x0", "rollout", "trajectory")
NUM_STEPS = 4
STUDENT = torch.tensor([1.4, 0.6], dtype=torch.float64)  # variance of each channel


@pytest.fixture
def steps() -> ReverseSteps:
    return reverse_steps("linear", NUM_STEPS)


@pytest.fixture
def estimates() -> Tensor:
    return torch.randn(NUM_STEPS, 3, 2, 5, dtype=torch.float64)


@pytest.fixture
def clean() -> Tensor:
    return torch.randn(3, 2, 5, dtype=torch.float64)


def close(value: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-14)


def test_the_likelihood_is_scipys_without_its_constant() -> None:
    error, deviation = torch.randn(20).double(), torch.rand(20).double() + 0.1
    expected = -scipy.stats.norm.logpdf(error, scale=deviation) - math.log(2 * math.pi) / 2
    close(gaussian_nll(error.square(), deviation.square()), torch.from_numpy(expected))


def test_the_expected_error_of_x0_is_the_mean_over_the_noise(
    estimates: Tensor, clean: Tensor, steps: ReverseSteps
) -> None:
    error, spread = Walk("x0", steps)(estimates, clean)
    expected = torch.zeros(NUM_STEPS, 2, dtype=torch.float64)
    # a quadratic has the same mean over +-1 as over the normal distribution
    for j, *noise in product(range(NUM_STEPS), (-1.0, 1.0), (-1.0, 1.0)):
        alpha, added = (law[j] for law in transition(*ends(steps)))
        u, v, _ = (coefficient[j] for coefficient in steps.posterior)
        there = (steps.noise[j] * STUDENT).sqrt()[:, None] * noise[0] + steps.amplitude[j] * clean
        here = alpha * there + (added * STUDENT).sqrt()[:, None] * noise[1]
        expected[j] += (there - u * here - v * estimates[j]).square().mean((0, 2)) / 4
    close(error + spread.noise[:, None] * STUDENT, expected)


def test_the_expected_error_of_the_rollout_is_the_mean_over_the_noise(
    estimates: Tensor, clean: Tensor, steps: ReverseSteps
) -> None:
    error, spread = Walk("rollout", steps)(estimates, clean)
    expected, state = torch.zeros(NUM_STEPS, 2, dtype=torch.float64), torch.zeros_like(clean)
    for j in range(NUM_STEPS):
        state = steps.posterior.u[j] * state + steps.posterior.v[j] * estimates[j]
        for sign in (-1.0, 1.0):
            noise = (steps.noise[j] * STUDENT).sqrt()[:, None] * sign
            target = steps.amplitude[j] * clean + noise
            expected[j] += (target - state).square().mean((0, 2)) / 2
    close(error + spread.noise[:, None] * STUDENT, expected)


def test_the_expected_error_of_the_trajectory_is_the_mean_over_its_start(
    estimates: Tensor, clean: Tensor, steps: ReverseSteps
) -> None:
    error, spread = Walk("trajectory", steps)(estimates, clean)
    expected = torch.zeros(NUM_STEPS, 2, dtype=torch.float64)
    for sign in (-1.0, 1.0):
        state = (STUDENT.sqrt() * sign)[:, None].expand_as(clean)
        for j in range(NUM_STEPS):
            target = steps.posterior.u[j] * state + steps.posterior.v[j] * clean
            expected[j] += (target - estimates[j]).square().mean((0, 2)) / 2
            state = estimates[j]
    close(error + spread.noise[:, None] * STUDENT, expected)


def ends(steps: ReverseSteps) -> tuple[Tensor, Tensor]:
    return steps.log_amplitude[:-1], steps.log_amplitude[1:]


def test_the_variance_of_the_predictions_is_that_of_the_posterior_or_the_level(
    estimates: Tensor, clean: Tensor, steps: ReverseSteps
) -> None:
    _, v, w = steps.posterior
    one = torch.ones_like(w)
    expected = {"x0": (w, v.square()), "rollout": (steps.noise, one), "trajectory": (w, one)}
    for reading in READINGS:
        _, spread = Walk(reading, steps)(estimates, clean)
        close(torch.stack([spread.prior, spread.gain]), torch.stack(expected[reading]))


def test_each_step_pulls_at_its_estimate_with_its_gain_of_signal(steps: ReverseSteps) -> None:
    learned = 0.3
    estimate = torch.full((NUM_STEPS, 1, 1, 1), 0.2, dtype=torch.float64, requires_grad=True)
    clean = torch.ones(1, 1, 1, dtype=torch.float64)
    error, spread = Walk("x0", steps)(estimate, clean)
    variance = spread.prior * STUDENT[0] + spread.gain * learned
    gaussian_nll(error[:, 0] + spread.noise * STUDENT[0], variance).sum().backward()
    precision = 1 / (learned + STUDENT[0] / signal_gain(*ends(steps)))
    assert estimate.grad is not None
    close(estimate.grad[:, 0, 0, 0], (0.2 - 1) * precision)


def test_one_step_is_variational_information_distillation(clean: Tensor) -> None:
    estimates = torch.randn(1, *clean.shape, dtype=torch.float64)
    error, spread = Walk("x0", reverse_steps("cosine", 1))(estimates, clean)
    variance = torch.tensor([[0.7, 1.9]], dtype=torch.float64)
    predicted = spread.prior[:, None] * STUDENT + spread.gain[:, None] * variance
    vid = (variance[0, :, None].log() + (clean - estimates[0]) ** 2 / variance[0, :, None]) / 2
    value = gaussian_nll(error + spread.noise[:, None] * STUDENT, predicted).mean()
    close(value, vid.mean())


def test_errors_of_branches_are_the_error_of_their_mean_and_their_diversity(
    estimates: Tensor, clean: Tensor
) -> None:
    # what sets the branches' own losses apart from the baseline "average"
    one = reverse_steps("cosine", 1).posterior
    mean = estimates.mean(0, keepdim=True)
    own = torch.cat([x0_error(estimate[None], clean, one) for estimate in estimates]).mean(0)
    diversity = (estimates - mean).square().mean((0, 1, 3))
    close(own, x0_error(mean, clean, one)[0] + diversity)


@pytest.mark.parametrize("start", [0.0, 1.7])
def test_a_rollout_is_the_chain_of_its_steps(steps: ReverseSteps, start: float) -> None:
    values, state = torch.randn(NUM_STEPS, dtype=torch.float64), torch.tensor(start).double()
    weights = rollout(steps.posterior)
    for j in range(NUM_STEPS):
        state = steps.posterior.u[j] * state + steps.posterior.v[j] * values[j]
        close(weights[j] @ torch.cat([torch.tensor([start]).double(), values]), state)
    close(weights[-1], torch.tensor([0.0] * NUM_STEPS + [1.0]).double())


def test_a_rollout_of_the_clean_sample_stays_at_the_amplitude_of_its_level() -> None:
    steps = reverse_steps("cosine", 8)
    start = steps.log_amplitude[0].exp()
    weights = rollout(steps.posterior)
    close(weights[:, 0] * start + weights[:, 1:].sum(1), steps.amplitude, rtol=1e-11)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("reading", READINGS)
def test_every_error_has_the_gradient_of_its_finite_differences(
    reading: Reading, estimates: Tensor, clean: Tensor, steps: ReverseSteps
) -> None:
    law, chain = steps.posterior, rollout(steps.posterior)[:, 1:]
    before = torch.randn_like(estimates)
    inputs = [held[..., :2].clone().requires_grad_() for held in (estimates, before, clean)]

    def error(estimates: Tensor, before: Tensor, clean: Tensor) -> Tensor:
        if reading == "rollout":
            return rollout_error(estimates, clean, chain, steps.amplitude)
        if reading == "trajectory":
            return trajectory_error(estimates, before, clean, law)
        return x0_error(estimates, clean, law)

    assert torch.autograd.gradcheck(error, inputs)


def test_a_state_of_the_trajectory_is_a_start_and_not_trained(
    estimates: Tensor, clean: Tensor, steps: ReverseSteps
) -> None:
    asking = estimates.clone().requires_grad_()
    error, _ = Walk("trajectory", steps)(asking, clean)
    (gradient,) = torch.autograd.grad(error[2].sum(), asking)
    assert bool((gradient[2] != 0).all())
    close(gradient[[0, 1, 3]], torch.zeros_like(gradient[[0, 1, 3]]))


@pytest.mark.parametrize("reading", READINGS)
def test_the_coefficients_follow_the_type_of_the_estimates(
    reading: Reading, estimates: Tensor, clean: Tensor, steps: ReverseSteps
) -> None:
    walk = Walk(reading, steps)
    error, spread = walk(estimates.float(), clean.float())
    exact, spread64 = walk(estimates, clean)
    assert {held.dtype for held in (error, *spread)} == {torch.float32}
    torch.testing.assert_close(error.double(), exact, rtol=1e-5, atol=1e-6)
    assert isinstance(spread64, Spread)
    assert not walk.state_dict()  # made from the configuration, not saved
