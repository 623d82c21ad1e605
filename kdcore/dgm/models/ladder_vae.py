"""The ladder VAE: its generator with the encoder that it is trained with."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType

from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Normal

from kdcore.batch_norm import BatchNorm
from kdcore.dgm.models.ladder import CHANNELS, Ladder, LadderGenerator, conditioned, gaussian_of
from kdcore.dgm.models.residual import ResidualBlock, stages
from kdcore.dgm.row_noise import NoiseSource
from kdcore.dgm.trace import Trace
from kdcore.dgm.variational import Inferred, Variational

_NO_TENSORS: Mapping[str, Tensor] = MappingProxyType({})


class LadderEncoder(nn.Module):
    """What a picture says about every latent, from the bottom up: one Gaussian per level.

    A condition joins every network as in the generator. Then the first is like the others; without
    one it starts with a 5x5 convolution: so the counts of parameters are the published ones.

    Raises ValueError for a z1 that is not half as high as the picture.
    """

    def __init__(self, ladder: Ladder) -> None:
        super().__init__()
        if ladder.image_size != 2 * ladder.sizes[0]:
            raise ValueError(
                f"z1 must be half as high as the picture of {ladder.image_size}, got "
                f"{ladder.sizes[0]}"
            )
        count, width = ladder.num_conditions, ladder.width
        seen = ladder.image_channels + count
        first = stages(seen, width, factor=2, resample="halve") if count else _stem(seen, width)
        others = (
            stages(width + count, width, factor=at // to, resample="halve")
            for at, to in pairwise(ladder.sizes)
        )
        self.networks = nn.ModuleList([first, *others])
        self.heads = nn.ModuleList(
            nn.Conv2d(width, 2 * CHANNELS, 1, bias=False) for _ in self.networks
        )
        self._takes_condition = count > 0

    def forward(self, image: Float[Tensor, "b c h w"], run: Trace) -> list[Normal]:
        laws, maps = [], image
        for network, head in zip(self.networks, self.heads, strict=True):
            if self._takes_condition:
                maps = conditioned(maps, run.input("condition"))
            maps = network(maps)
            laws.append(gaussian_of(head(maps)))
        return laws


class LadderVAE(Variational):
    """The generator with its encoder, whose Gaussians are multiplied with the generator's own.

    At the top the encoder's alone is the posterior. The target is ``y``.

    Source: Sonderby et al. 2016, arXiv:1602.02282, equations 15 to 19; sizes, Chen et al. 2023.
    """

    def __init__(self, ladder: Ladder) -> None:
        super().__init__()
        self.generator: LadderGenerator = LadderGenerator(ladder)
        self.encoder = LadderEncoder(ladder)

    def infer(
        self,
        observed: Mapping[str, Tensor],
        *,
        inputs: Mapping[str, Tensor] = _NO_TENSORS,
        noise: NoiseSource | None = None,
    ) -> Inferred:
        values, model = dict(observed), self.generator
        posterior = Trace(len(values["y"]), inputs=inputs, generator=noise)
        joint = Trace(len(values["y"]), inputs=inputs, values=values)
        seen = self.encoder(values["y"], joint)
        law, own = model.prior(joint), seen[-1]
        for level in range(model.depth, 0, -1):
            name = f"z{level}"
            values[name] = posterior.latent(name, own)  # the joint run reads it here
            z = joint.latent(name, law)
            if level > 1:
                law = model.conditional(level - 1, z, joint)
                own = product_of(seen[level - 2], law)
        joint.target("y", model.picture(z, joint))
        return Inferred(posterior, joint)


def product_of(first: Normal, second: Normal) -> Normal:
    r"""The Gaussian proportional to the product of two densities.

    .. math:: \sigma^{-2} = \sigma_1^{-2} + \sigma_2^{-2}, \quad
        \mu = \sigma^2 (\mu_1 \sigma_1^{-2} + \mu_2 \sigma_2^{-2})
    """
    here, there = first.scale.square().reciprocal(), second.scale.square().reciprocal()
    variance = (here + there).reciprocal()
    mean = variance * (first.loc * here + second.loc * there)
    return Normal(mean, variance.sqrt(), validate_args=False)


def _stem(in_channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 5, stride=2, padding=2, bias=False),
        BatchNorm(width),
        nn.ReLU(),
        ResidualBlock(width, width),
        ResidualBlock(width, width),
    )
