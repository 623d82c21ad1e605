"""Losses on the student's map once a small diffusion model of the teacher's has denoised it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kdcore.batch_norm import BatchNorm
from kdcore.losses.ddim import NUM_TIMES, denoised, signal_shares
from kdcore.losses.features import mean_squared_error
from kdcore.losses.maps import Connectors
from kdcore.philox import normal, uniform
from kdcore.terms import Term
from kdcore.types import Batch, Outputs, Probe


class Denoising(Term):
    r"""Mean squared difference of the teacher's map, compressed, and the student's, denoised.

    .. math:: \sum_l \mathrm{mse}\big( P(\hat x_0), z \big)
        + \mathrm{mse}\big( \epsilon_\theta(z_\tau, \tau), \epsilon \big)
        + \mathrm{mse}\big( D(z), t_l \big), \quad z = E(t_l)

    where :math:`\hat x_0` is :math:`\gamma \, r(s_l) + (1 - \gamma) \, \epsilon'` after ``steps``
    of the diffusion model, with a share :math:`\gamma` learned for each picture, and :math:`z_\tau`
    is z with the noise of a random time. To the first two parts z is a constant: the compression is
    learned from the third alone. Noise and times are functions of the picture's row, the epoch and
    ``seed``. Nothing of this is kept when the student is.

    Source: Huang and others 2023 (DiffKD), arXiv:2305.15712, with the networks of their code. They
    add the same for logits.
    """

    shares: Tensor

    def __init__(
        self,
        layers: Mapping[str, str],
        probe: Probe,
        *,
        reduction: int = 2,
        steps: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= steps <= NUM_TIMES // 2:
            raise ValueError(f"steps must be from 1 to {NUM_TIMES // 2}, got {steps}")
        self.maps = Connectors(layers, probe, partial(_compressed, reduction=reduction))
        self.models = nn.ModuleList(
            _Diffusion(pair.teacher_shape[1], reduction) for pair in self.maps.pairs
        )
        self.steps, self.seed = steps, seed
        self.register_buffer("shares", signal_shares(), persistent=False)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Float[Tensor, ""]:
        parts = []
        for place, (here, there) in enumerate(self.maps(student, teacher)):
            model = cast(_Diffusion, self.models[place])
            latent, remade = model.compress(there)
            target = latent.detach()  # cut: else it would move towards the student, to a constant
            parts += [
                mean_squared_error(self.refined(here, model, batch, place), target),
                self._noise_error(target, model, batch, place),
                mean_squared_error(remade, there),
            ]
        return torch.stack(parts).sum()

    def refined(
        self, maps: Float[Tensor, "b c h w"], model: _Diffusion, batch: Batch, place: int
    ) -> Float[Tensor, "b c h w"]:
        """The student's map with as much noise as it seems to have, denoised and projected."""
        share = model.signal_share(maps)[:, None, None, None]
        noise = self._drawn(normal, batch, maps.shape[1:], stream=3 * place).to(maps)
        mixed = share * maps + (1 - share) * noise
        clean = denoised(mixed, model.predict_noise, self.shares, steps=self.steps)
        projected: Tensor = model.project(clean)
        return projected

    def _noise_error(self, maps: Tensor, model: _Diffusion, batch: Batch, place: int) -> Tensor:
        noise = self._drawn(normal, batch, maps.shape[1:], stream=3 * place + 1).to(maps)
        when = self._drawn(uniform, batch, (), stream=3 * place + 2)
        time = (when * NUM_TIMES).long()
        share = self.shares[time].to(maps)[:, None, None, None]
        noisy = share.sqrt() * maps + (1 - share).sqrt() * noise
        return mean_squared_error(model.predict_noise(noisy, time), noise)

    def _drawn(
        self, draw: Callable[..., Tensor], batch: Batch, shape: Sequence[int], *, stream: int
    ) -> Tensor:
        return draw(batch.index, shape, epoch=batch.epoch, stream=stream, seed=self.seed)


class _Diffusion(nn.Module):
    """What is learned for one pair of maps: compression, noise at each time, the signal's share."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        width = _width(channels, reduction)
        self.encode = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), BatchNorm(width))
        self.decode = nn.Conv2d(width, channels, 1)
        self.time = nn.Embedding(NUM_TIMES, width)
        self.noise = nn.Sequential(
            _Bottleneck(width, reduction=4),
            _Bottleneck(width, reduction=4),
            nn.Conv2d(width, width, 1, bias=False),
            BatchNorm(width),
        )
        self.look = _Bottleneck(width, reduction=8)
        self.judge = nn.Linear(width, 2)
        self.project = nn.Conv2d(width, width, 1)

    def compress(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The latent maps, and what can be made of them again."""
        latent = self.encode(maps)
        return latent, self.decode(latent)

    def predict_noise(self, maps: Tensor, time: Int[Tensor, " b"]) -> Tensor:
        predicted: Tensor = self.noise(maps + self.time(time)[:, :, None, None])
        return predicted

    def signal_share(self, maps: Tensor) -> Float[Tensor, " b"]:
        judged: Tensor = self.judge(self.look(maps).mean(dim=(2, 3)))
        return judged.softmax(dim=1)[:, 0]


class _Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1, narrower inside, added to their input."""

    def __init__(self, channels: int, *, reduction: int) -> None:
        super().__init__()
        width = _width(channels, reduction)
        self.block = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            BatchNorm(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            BatchNorm(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 1, bias=False),
            BatchNorm(channels),
        )

    def forward(self, maps: Tensor) -> Tensor:
        added: Tensor = maps + self.block(maps)
        return added


def _compressed(student: Sequence[int], teacher: Sequence[int], *, reduction: int) -> nn.Module:
    return nn.Conv2d(student[1], _width(teacher[1], reduction), 1)


def _width(channels: int, reduction: int) -> int:
    return max(1, channels // reduction)
