"""Batch normalisation over the rows of all workers: in projectors and in graphical models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.rows import gather_rows, num_workers


class BatchNorm(nn.Module):
    r"""Maps with mean 0 and variance 1 in each channel, then scaled and shifted by what it learns.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    In training the moments are those of the batch over all workers, so that two workers train as
    one would: torch's ``BatchNorm2d`` takes each worker's own, its ``SyncBatchNorm`` wants a GPU.
    In evaluation they are running means, as in torch, whose state dict it shares.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if self.training:
            self.num_batches_tracked += 1
        if self.training and num_workers() > 1:
            return self._normalised_over_workers(maps)
        return F.batch_norm(
            maps,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )

    def _normalised_over_workers(self, maps: Tensor) -> Tensor:
        mean, variance = moments(maps)
        centred = maps - mean[:, None, None]
        with torch.no_grad():
            count = num_workers() * maps.numel() // maps.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def moments(maps: Float[Tensor, "b c ..."]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Mean and biased variance of each channel over all rows, positions and workers.

    With gradient: two workers' moments of halves of a batch are those of the whole in one process.
    """
    others = [0, *range(2, maps.ndim)]
    mean = _over_workers(maps.mean(dim=others))
    centred = maps - mean.reshape(-1, *[1] * (maps.ndim - 2))
    return mean, _over_workers(centred.square().mean(dim=others))


def _over_workers(moment: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    return gather_rows(moment[None]).mean(dim=0)
