r"""The noise schedule and the exact posterior of any skip, in float64 and in logarithms.

Level k of n is :math:`x_k \sim N(a_k x_0, b_k^2 \sigma^2)` with :math:`b_k^2 = 1 - a_k^2`; k = 0 is
clean, k = n is where the reverse process starts. Amplitudes come as :math:`\log a_k`, because
:math:`1 - a_k^2` loses every digit near k = 0. Letters are those of the paper: Yao and others 2024,
"Progressively Knowledge Distillation via Re-parameterizing Diffusion Reverse Process", AAAI 38(15),
equations 5 to 7, of which 7 is misprinted on its poster: it lost the hats and gained a square.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdcore.checks import unknown_name

NoiseSchedule = Literal["linear", "linear_ddpm", "cosine"]

_DDPM_LEVELS = 1000


class Posterior(NamedTuple):
    """The law of an earlier level: mean ``u x_t + v x_0``, variance ``w`` times that of the noise.

    Each is a scalar or one value per pair of levels.
    """

    u: Float[Tensor, "*k"]
    v: Float[Tensor, "*k"]
    w: Float[Tensor, "*k"]


class ReverseSteps(NamedTuple):
    """The m steps from level n down to level 0, step j from ``level[j]`` to ``level[j + 1]``."""

    level: Int[Tensor, " ends"]
    log_amplitude: Float[Tensor, " ends"]
    posterior: Posterior  # of one value per step

    @property
    def amplitude(self) -> Float[Tensor, " m"]:
        """The amplitude to which each step leads."""
        return self.log_amplitude[1:].exp()

    @property
    def noise(self) -> Float[Tensor, " m"]:
        """The variance of the noise to which each step leads."""
        return noise_variance(self.log_amplitude[1:])


def log_amplitudes(schedule: NoiseSchedule, num_levels: int) -> Float[Tensor, " levels"]:
    r"""The logarithms of :math:`a_0 = 1 > a_1 > \dots > a_n`.

    "linear" is DDPM's linear variance in continuous time, for any n:
    :math:`\log a_k = -\tfrac{19.9}{4} (k/n)^2 - \tfrac{0.1}{2} k/n`. "linear_ddpm" is every
    (1000 / n)-th of DDPM's own thousand levels. "cosine" is :math:`a_k^2 = f(k) / f(0)`,
    :math:`f(k) = \cos^2 \big( \tfrac{k/n + 0.008}{1.008} \tfrac{\pi}{2} \big)`, where no step may
    add more than 0.999 of variance.

    Raises ValueError for an unknown schedule, no level, or more levels than DDPM has.

    Source: Ho et al. 2020, arXiv:2006.11239, section 4; Song et al. 2021, arXiv:2011.13456,
    equation 33; Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17.
    """
    if num_levels < 1:
        raise ValueError(f"a schedule needs at least one level, got {num_levels}")
    if schedule == "linear":
        share = torch.arange(num_levels + 1, dtype=torch.float64) / num_levels
        return -19.9 / 4 * share.square() - 0.1 / 2 * share
    if schedule == "linear_ddpm":
        return _ddpm_log_amplitudes(num_levels)
    if schedule == "cosine":
        return _cosine_log_amplitudes(num_levels)
    raise ValueError(unknown_name("schedule", schedule, ("linear", "linear_ddpm", "cosine")))


def noise_variance(log_amplitude: Float[Tensor, "*k"]) -> Float[Tensor, "*k"]:
    r"""The share of noise, :math:`b^2 = 1 - a^2`."""
    return 0.0 - torch.expm1(2 * log_amplitude)  # rather than a minus: +0.0 at the clean level


def transition(
    log_noisy: Float[Tensor, "*k"], log_clean: Float[Tensor, "*k"]
) -> tuple[Float[Tensor, "*k"], Float[Tensor, "*k"]]:
    r"""The law of a noisier level t given a cleaner one s: amplitude and variance of its noise.

    .. math:: q(x_t | x_s) = N(\alpha x_s, \beta^2 \sigma^2), \quad
        \alpha = a_t / a_s, \quad \beta^2 = 1 - \alpha^2
    """
    return (log_noisy - log_clean).exp(), noise_variance(log_noisy - log_clean)


def posterior(log_noisy: Float[Tensor, "*k"], log_clean: Float[Tensor, "*k"]) -> Posterior:
    r"""The law of a cleaner level s given a noisier one t and the clean sample, for any s < t.

    .. math:: q(x_s | x_t, x_0) = N(u x_t + v x_0, w \sigma^2), \quad
        u = \frac{b_s^2 \alpha}{b_t^2}, \quad v = \frac{\beta^2 a_s}{b_t^2}, \quad
        w = \frac{\beta^2 b_s^2}{b_t^2}

    At s = 0 it is the clean sample itself: u = 0, v = 1, w = 0 exactly.

    Source: Yao and others 2024, equation 7, corrected: every alpha and beta of a level is the
    cumulative one, and alpha is the ratio of amplitudes, not its square.
    """
    alpha, variance = transition(log_noisy, log_clean)
    noisy, clean = noise_variance(log_noisy), noise_variance(log_clean)
    v = variance * log_clean.exp() / noisy
    return Posterior(clean * alpha / noisy, v, variance * clean / noisy)


def implicit_posterior(
    log_noisy: Float[Tensor, "*k"], log_clean: Float[Tensor, "*k"], *, eta: float = 0.0
) -> Posterior:
    r"""DDIM's law of a cleaner level, which agrees on every level but has less noise between them.

    .. math:: u = \sqrt{b_s^2 - \eta^2 w} / b_t, \quad v = a_s - u a_t, \quad w' = \eta^2 w

    with w of ``posterior``, to which it leads at eta = 1. Written without differences.

    Source: Song et al. 2021, arXiv:2010.02502, equations 12 and 16.
    """
    alpha, variance = transition(log_noisy, log_clean)
    noisy, clean = noise_variance(log_noisy), noise_variance(log_clean)
    w = eta**2 * variance * clean / noisy
    # b_s^2 - eta^2 w, over b_s^2 / b_t^2
    kept = (alpha.square() * clean + (1 - eta**2) * variance).sqrt()
    u = clean.sqrt() * kept / noisy
    amplitude = log_clean.exp()
    # (a_s - u a_t) times its conjugate a_s + u a_t, and divided by it
    squares = (amplitude.square() * variance + w * log_noisy.exp().square()) / noisy
    return Posterior(u, squares / (amplitude + u * log_noisy.exp()), w)


def signal_gain(
    log_noisy: Float[Tensor, "*k"], log_clean: Float[Tensor, "*k"]
) -> Float[Tensor, "*k"]:
    r"""By how much the signal-to-noise ratio is higher at the cleaner level; infinite at level 0.

    .. math:: \frac{v^2}{w} = \frac{a_s^2}{b_s^2} - \frac{a_t^2}{b_t^2}

    This is the weight that step t to s gives to the squared error of an estimate of the clean
    sample, where the variance is that of the posterior.
    """
    _, variance = transition(log_noisy, log_clean)
    noises = noise_variance(log_noisy) * noise_variance(log_clean)
    return variance * (2 * log_clean).exp() / noises


def reverse_steps(
    schedule: NoiseSchedule, num_steps: int, *, num_levels: int = 1000
) -> ReverseSteps:
    r"""m steps between n levels, as even as whole levels allow.

    .. math:: \tau_j = \lfloor n (m - j) / m + 1/2 \rfloor, \quad j = 0, \dots, m

    n hardly matters: at every n, step j is between the same shares of the schedule.

    Raises ValueError unless 1 <= m <= n.
    """
    m, n = num_steps, num_levels
    if not 1 <= m <= n:
        raise ValueError(f"the number of steps must be from 1 to the {n} levels, got {m}")
    level = torch.tensor([(2 * n * (m - j) + m) // (2 * m) for j in range(m + 1)])
    log_amplitude = log_amplitudes(schedule, n)[level]
    return ReverseSteps(level, log_amplitude, posterior(log_amplitude[:-1], log_amplitude[1:]))


def _ddpm_log_amplitudes(num_levels: int) -> Float[Tensor, " levels"]:
    if num_levels > _DDPM_LEVELS:
        raise ValueError(
            f"schedule 'linear_ddpm' has {_DDPM_LEVELS} levels, got {num_levels}; use 'linear'"
        )
    number = torch.arange(_DDPM_LEVELS, dtype=torch.float64)
    added = 1e-4 + (0.02 - 1e-4) * number / (_DDPM_LEVELS - 1)
    picked = [
        (2 * _DDPM_LEVELS * k + num_levels) // (2 * num_levels) for k in range(num_levels + 1)
    ]
    return _accumulated(added)[picked]


def _cosine_log_amplitudes(num_levels: int) -> Float[Tensor, " levels"]:
    quarter = math.pi / 2 / 1.008
    before = (torch.arange(num_levels, dtype=torch.float64) / num_levels + 0.008) * quarter
    turn = quarter / num_levels
    # 1 - cos^2(before + turn) / cos^2(before), without its cancellation
    added = math.sin(turn) * torch.sin(2 * before + turn) / before.cos().square()
    return _accumulated(added.clamp(max=0.999))


def _accumulated(added: Float[Tensor, " n"]) -> Float[Tensor, " levels"]:
    """The logarithms of the amplitudes whose steps add these variances."""
    return torch.cat([added.new_zeros(1), 0.5 * torch.log1p(-added).cumsum(0)])
