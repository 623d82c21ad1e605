r"""What the estimates of the branches cost at every step, by three readings of the paper.

Estimates are (m, B, C, P): step, row, channel, position; the clean sample is the teacher's feature
(B, C, P). A reading gives each step and channel a mean squared error, and a ``Spread``: what the
noise adds to that error in expectation, and how the variance of the prediction is made. So nothing
is sampled. Letters are those of ``schedule``.

Source: Yao and others 2024, equations 1 to 7, whose poster does not decide between the readings.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.kdiffusion.schedule import Posterior, ReverseSteps

Reading = Literal["x0", "rollout", "trajectory"]


class Spread(NamedTuple):
    """Per step: noise in the error and in the prediction, in units of the student's variance.

    ``gain`` is by how much the variance of an estimate counts in that of the prediction.
    """

    noise: Float[Tensor, " m"]
    prior: Float[Tensor, " m"]
    gain: Float[Tensor, " m"]


class Walk(nn.Module):
    """The steps of one reading: from estimates and clean feature to mean squared errors and spread.

    Held as buffers in float64, used in the type of the estimates.
    """

    _law: Tensor
    _level: Tensor
    _chain: Tensor

    def __init__(self, reading: Reading, steps: ReverseSteps) -> None:
        super().__init__()
        self._reading = reading
        level = torch.stack([steps.amplitude, steps.noise])
        self.register_buffer("_law", torch.stack(steps.posterior), persistent=False)
        self.register_buffer("_level", level, persistent=False)
        self.register_buffer("_chain", rollout(steps.posterior)[:, 1:], persistent=False)

    def forward(
        self, estimates: Float[Tensor, "m b c p"], clean: Float[Tensor, "b c p"]
    ) -> tuple[Float[Tensor, "m c"], Spread]:
        law = Posterior(*self._law.to(estimates))
        amplitude, noise = self._level.to(estimates)
        if self._reading == "rollout":
            error = rollout_error(estimates, clean, self._chain.to(estimates), amplitude)
            return error, Spread(noise, noise, torch.ones_like(noise))
        if self._reading == "trajectory":
            before = torch.cat([torch.zeros_like(estimates[:1]), estimates[:-1]])
            # without its graph: the state before is where a step starts, not what it trains
            error = trajectory_error(estimates, before.detach(), clean, law)
            # the start is noise of the student's variance, which the first step multiplies by u
            start = torch.cat([law.u[:1].square(), torch.zeros_like(law.u[1:])])
            return error, Spread(start, law.w, torch.ones_like(law.w))
        return x0_error(estimates, clean, law), Spread(law.w, law.w, law.v.square())


def rollout(law: Posterior) -> Float[Tensor, "m terms"]:
    r"""What each state of the strict reverse chain is made of: its start and the m estimates.

    .. math:: z_j = u_j z_{j-1} + v_j \hat x_j = C_{j0} z_0 + \sum_{i \le j} C_{ji} \hat x_i

    Row j is :math:`C_j`. The last row is (0, ..., 0, 1): the last estimate alone decides.
    """
    state = torch.zeros(len(law.u) + 1, dtype=torch.float64)
    state[0], rows = 1.0, []
    for j, (u, v) in enumerate(zip(law.u, law.v, strict=True), start=1):
        state = u * state
        state[j] = v
        rows.append(state)
    return torch.stack(rows)


def gaussian_nll(
    squared_error: Float[Tensor, "*k"], variance: Float[Tensor, "*k"]
) -> Float[Tensor, "*k"]:
    r"""Negative log-likelihood of each number, without the constant :math:`\frac12 \log 2\pi`.

    .. math:: \tfrac12 \big( \log V + e^2 / V \big)

    Its expectation over noise in the error takes the expected squared error.
    """
    return (variance.log() + squared_error / variance) / 2


def x0_error(
    estimates: Float[Tensor, "m b c p"], clean: Float[Tensor, "b c p"], law: Posterior
) -> Float[Tensor, "m c"]:
    r"""Each estimate inside the posterior from the teacher's own noisy state.

    .. math:: -\log N(x_s; u x_t + v y_j, w \sigma^2 + v^2 \delta^2), \quad
        x_s - u x_t \sim N(v x_0, w \sigma^2)

    The noisy states cancel, so every step compares with the clean feature, at its own precision:
    the gradient is :math:`(y_j - x_0) / (\delta^2 + \sigma^2 / g_j)`, g the gain of signal. With
    one step, where u = w = 0 and v = 1, this is variational information distillation.
    """
    return law.v.square()[:, None] * (clean - estimates).square().mean((1, 3))


def rollout_error(
    estimates: Float[Tensor, "m b c p"],
    clean: Float[Tensor, "b c p"],
    chain: Float[Tensor, "m m"],
    amplitude: Float[Tensor, " m"],
) -> Float[Tensor, "m c"]:
    r"""The strict reverse chain of the estimates, from zero, against each level's noisy feature.

    .. math:: -\log N(x_s; z_j, b_s^2 \sigma^2 + \delta^2), \quad z_j = u_j z_{j-1} + v_j y_j, \quad
        z_0 = 0

    ``chain`` is ``rollout`` without its first column, which belongs to the start.
    """
    states = torch.einsum("ji,ibcp->jbcp", chain, estimates)
    return (amplitude[:, None, None, None] * clean - states).square().mean((1, 3))


def trajectory_error(
    estimates: Float[Tensor, "m b c p"],
    before: Float[Tensor, "m b c p"],
    clean: Float[Tensor, "b c p"],
    law: Posterior,
) -> Float[Tensor, "m c"]:
    r"""Each estimate as a state itself, against the posterior's mean from the state before.

    .. math:: -\log N(u y_{j-1} + v x_0; y_j, w \sigma^2 + \delta^2), \quad y_0 \sim N(0, \sigma^2)

    ``before[0]`` is the mean of the start, zero; its noise is in the ``Spread``.
    """
    u, v = (coefficient[:, None, None, None] for coefficient in (law.u, law.v))
    return (u * before + v * clean - estimates).square().mean((1, 3))
