"""Noise schedules and the posterior of any skip: laws, Bayes' theorem, and what is refused."""

from __future__ import annotations

import pytest
import torch

from kdcore.kdiffusion.schedule import (
    NoiseSchedule,
    implicit_posterior,
    log_amplitudes,
    noise_variance,
    posterior,
    reverse_steps,
    signal_gain,
    transition,
)

SCHEDULES: tuple[NoiseSchedule, ...] = ("linear", "linear_ddpm", "cosine")


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    name: NoiseSchedule = request.param
    return name


def close(value: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize(("t", "s"), [(6, 4), (8, 6), (8, 1), (5, 4), (2, 1)])
@pytest.mark.parametrize(("state", "clean"), [(0.7, -1.3), (-2.0, 0.4)])
def test_the_posterior_is_that_of_bayes_theorem(
    schedule: NoiseSchedule, t: int, s: int, state: float, clean: float
) -> None:
    noise = 1.7**2  # the student's variance
    log_a = log_amplitudes(schedule, 8)
    alpha, added = transition(log_a[t], log_a[s])
    # q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): on a grid wide and fine
    # enough that sums of these densities are integrals to machine precision
    x = torch.linspace(-25, 25, 50_001, dtype=torch.float64)
    exponent = (state - alpha * x) ** 2 / added
    exponent += (x - log_a[s].exp() * clean) ** 2 / noise_variance(log_a[s])
    density = torch.softmax(-exponent / (2 * noise), dim=0)
    mean = (density * x).sum()
    variance = (density * (x - mean) ** 2).sum()
    law = posterior(log_a[t], log_a[s])
    close(law.u * state + law.v * clean, mean, rtol=1e-9)
    close(law.w * noise, variance, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 4, 16, 1000])
def test_levels_fall_from_one_and_noise_rises_from_zero(schedule: NoiseSchedule, n: int) -> None:
    log_a = log_amplitudes(schedule, n)
    assert log_a.dtype is torch.float64
    assert log_a.shape == (n + 1,)
    assert float(log_a[0]) == 0
    assert bool((log_a.diff() < 0).all())
    noise = noise_variance(log_a)
    assert str(float(noise[0])) == "0.0"  # not -0.0, of which a logarithm or a print would tell
    assert bool((noise.diff() >= 0).all())  # at the end of 1000 levels, 1 - 1e-9 may not move
    close(log_a.exp().square() + noise, torch.ones(n + 1, dtype=torch.float64))


@pytest.mark.parametrize("n", [4, 16, 1000])
def test_mean_and_variance_of_a_level_do_not_depend_on_the_way_there(
    schedule: NoiseSchedule, n: int
) -> None:
    log_a = log_amplitudes(schedule, n)
    picked = range(0, n + 1, max(1, n // 23))
    pairs = torch.tensor([(t, s) for t in picked for s in picked if s < t])
    noisy, clean = log_a[pairs.T]
    law = posterior(noisy, clean)
    close(law.u * noisy.exp() + law.v, clean.exp())
    close(law.u.square() * noise_variance(noisy) + law.w, noise_variance(clean))


def test_two_skips_are_one(schedule: NoiseSchedule) -> None:
    log_a = log_amplitudes(schedule, 1000)
    far, half = posterior(log_a[800], log_a[300]), posterior(log_a[300], log_a[7])
    whole = posterior(log_a[800], log_a[7])
    close(half.u * far.u, whole.u)
    close(half.u * far.v + half.v, whole.v)
    close(half.u.square() * far.w + half.w, whole.w)


def test_the_last_step_is_the_clean_sample_exactly(schedule: NoiseSchedule) -> None:
    log_a = log_amplitudes(schedule, 8)
    for t in range(1, 9):
        for law in (posterior(log_a[t], log_a[0]), implicit_posterior(log_a[t], log_a[0])):
            assert float(law.u) == 0
            assert float(law.w) == 0
            close(law.v, torch.ones((), dtype=torch.float64))
        assert float(posterior(log_a[t], log_a[0]).v) == 1


def test_the_gain_of_signal_is_squared_weight_over_variance(
    schedule: NoiseSchedule,
) -> None:
    log_a = log_amplitudes(schedule, 16)
    noisy, clean = log_a[2:], log_a[1:-1]
    law = posterior(noisy, clean)
    close(signal_gain(noisy, clean), law.v.square() / law.w)
    ratio = (2 * log_a[1:]).exp() / noise_variance(log_a[1:])
    close(signal_gain(noisy, clean), -ratio.diff(), rtol=1e-9)
    assert bool(signal_gain(log_a[5], log_a[0]).isposinf())


@pytest.mark.parametrize("n", [4, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_implicit_process_has_the_same_levels_and_less_noise(
    schedule: NoiseSchedule, n: int, eta: float
) -> None:
    log_a = log_amplitudes(schedule, n)
    noisy, clean = log_a[1:], log_a[:-1]
    law, exact = implicit_posterior(noisy, clean, eta=eta), posterior(noisy, clean)
    close(law.w, eta**2 * exact.w)
    close(law.u * noisy.exp() + law.v, clean.exp())
    close(law.u.square() * noise_variance(noisy) + law.w, noise_variance(clean))
    if eta == 1:
        close(torch.stack(law), torch.stack(exact))


def test_the_thousand_levels_are_those_of_ddpm() -> None:
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
    close(log_amplitudes("linear_ddpm", 1000)[1:].exp().square(), kept)
    close(log_amplitudes("linear_ddpm", 4)[1:].exp().square(), kept[249::250])


def test_the_cosine_schedule_is_its_formula_but_for_the_clip_at_its_end() -> None:
    share = torch.arange(17, dtype=torch.float64) / 16
    curve = torch.cos((share + 0.008) / 1.008 * torch.pi / 2) ** 2
    close(log_amplitudes("cosine", 16)[:-1].exp().square(), (curve / curve[0])[:-1])
    last = log_amplitudes("cosine", 16)[-2:].exp().square()
    close(last[1] / last[0], torch.tensor(0.001, dtype=torch.float64))


def test_the_number_of_levels_hardly_matters() -> None:
    few, many = (torch.stack(reverse_steps("linear", 8, num_levels=n).posterior) for n in (8, 1000))
    close(few, many)


def test_the_steps_of_four_of_eight_levels() -> None:
    steps = reverse_steps("cosine", 4, num_levels=8)
    assert steps.level.tolist() == [8, 6, 4, 2, 0]
    # to the six digits of the specification's example
    expected = {
        "u": [0.013792, 0.319702, 0.230793, 0.0],
        "v": [0.379747, 0.581307, 0.758145, 1.0],
        "w": [0.855538, 0.418693, 0.126027, 0.0],
    }
    for name, values in expected.items():
        value = getattr(steps.posterior, name)
        torch.testing.assert_close(value, torch.tensor(values).double(), rtol=0, atol=5e-7)
    log_a = log_amplitudes("cosine", 8)[[6, 4, 2, 0]]
    close(steps.amplitude, log_a.exp())
    close(steps.noise, noise_variance(log_a))


def test_steps_that_do_not_divide_the_levels_are_nearly_even() -> None:
    assert reverse_steps("linear", 3, num_levels=10).level.tolist() == [10, 7, 3, 0]


@pytest.mark.parametrize("m", [0, 9, -1])
def test_more_steps_than_levels_are_refused(m: int) -> None:
    with pytest.raises(ValueError, match=rf"must be from 1 to the 8 levels, got {m}"):
        reverse_steps("linear", m, num_levels=8)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_schedule_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'cosin'; did you mean 'cosine'"):
        log_amplitudes("cosin", 8)  # type: ignore[arg-type]


def test_more_levels_than_ddpm_has_are_refused() -> None:
    with pytest.raises(ValueError, match="'linear_ddpm' has 1000 levels, got 1001; use 'linear'"):
        log_amplitudes("linear_ddpm", 1001)


def test_a_schedule_without_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one level, got 0"):
        log_amplitudes("linear", 0)
