r"""The variational recurrent network of pen strokes: a latent in every step of an LSTM."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

from kdcore.dgm.row_noise import NoiseSource
from kdcore.dgm.trace import Trace
from kdcore.dgm.variational import Inferred, Variational

_NO_TENSORS: Mapping[str, Tensor] = MappingProxyType({})


class State(NamedTuple):
    """What the LSTM hands from step to step."""

    hidden: Float[Tensor, "b h"]
    cell: Float[Tensor, "b h"]


class VRNNGenerator(nn.Module):
    r"""p(z_t | h_t) p(x_t | z_t, h_t), h_{t+1} from both: what is distilled.

    Latents ``z[t]``; targets ``pen[t]``, the bit of a lifted pen, (B, 1), and ``xy[t]``, its way of
    ``continuous`` numbers with standard deviation 1. The input ``length``, where a run has it, ends
    its rows early: later steps are masked. Published: a hidden width of 512 with a state of 1200,
    and 128 with 600.

    Source: Chung et al. 2015, arXiv:1506.02216; sizes, Chen et al. 2023.
    """

    def __init__(
        self, *, length: int, hidden: int, state: int, latent: int = 16, continuous: int = 2
    ) -> None:
        super().__init__()
        self.length, self.state_width, self.continuous = length, state, continuous
        self.of_x = nn.Sequential(_two_layers(1 + continuous, hidden), nn.ReLU())
        self.of_z = nn.Sequential(_two_layers(latent, hidden), nn.ReLU())
        self.prior = _three_layers(state, hidden, 2 * latent)
        self.decoder = _three_layers(hidden + state, hidden, 1 + continuous)
        self.cell = nn.LSTMCell(2 * hidden, state)

    def forward(self, run: Trace) -> None:
        state = self.start(run)
        for t in range(self.length):
            law = gaussian_of(self.prior(state.hidden))
            z = self.of_z(run.latent(f"z[{t}]", law, mask=self.mask(t, run)))
            x = self.draw(t, z, state, run)
            if t + 1 < self.length:  # nobody reads what comes after the last
                state = self.next(self.of_x(x), z, state)

    def start(self, run: Trace) -> State:
        """The state before the first step: zeros."""
        zero = self.cell.weight_hh.new_zeros(run.num_rows, self.state_width)
        return State(zero, zero)

    def mask(self, t: int, run: Trace) -> Tensor | None:
        """The rows that still have a step t; None where all do."""
        return run.inputs["length"] > t if "length" in run.inputs else None

    def draw(
        self, t: int, z: Float[Tensor, "b k"], state: State, run: Trace
    ) -> Float[Tensor, "b c"]:
        """The targets of a step, from the features of its latent."""
        out = self.decoder(torch.cat([z, state.hidden], dim=1))
        logit, mean = out[:, :1], out[:, 1:]
        mask = self.mask(t, run)
        pen = Bernoulli(logits=logit, validate_args=False)
        way = Normal(mean, torch.ones_like(mean), validate_args=False)
        return torch.cat(
            [run.target(f"pen[{t}]", pen, mask=mask), run.target(f"xy[{t}]", way, mask=mask)], dim=1
        )

    def next(self, x: Float[Tensor, "b k"], z: Float[Tensor, "b k"], state: State) -> State:
        """The state after a step, from the features of its targets and of its latent."""
        return State(*self.cell(torch.cat([x, z], dim=1), state))


class VRNN(Variational):
    """The generator with the network that infers z_t from x_t and h_t."""

    def __init__(
        self, *, length: int, hidden: int, state: int, latent: int = 16, continuous: int = 2
    ) -> None:
        super().__init__()
        self.generator: VRNNGenerator = VRNNGenerator(
            length=length, hidden=hidden, state=state, latent=latent, continuous=continuous
        )
        self.inference = _three_layers(hidden + state, hidden, 2 * latent)

    def infer(
        self,
        observed: Mapping[str, Tensor],
        *,
        inputs: Mapping[str, Tensor] = _NO_TENSORS,
        noise: NoiseSource | None = None,
    ) -> Inferred:
        values, model = dict(observed), self.generator
        num_rows = len(values["pen[0]"])
        posterior = Trace(num_rows, inputs=inputs, generator=noise)
        joint = Trace(num_rows, inputs=inputs, values=values)
        state, features = model.start(joint), self._features(values)
        for t in range(model.length):
            name, mask = f"z[{t}]", model.mask(t, joint)
            x = features[t]
            law = gaussian_of(self.inference(torch.cat([x, state.hidden], dim=1)))
            values[name] = posterior.latent(name, law, mask=mask)
            z = model.of_z(joint.latent(name, gaussian_of(model.prior(state.hidden)), mask=mask))
            model.draw(t, z, state, joint)
            if t + 1 < model.length:
                state = model.next(x, z, state)
        return Inferred(posterior, joint)

    def _features(self, values: Mapping[str, Tensor]) -> Float[Tensor, "t b k"]:
        # of all steps in one call: they are known beforehand
        steps = range(self.generator.length)
        x = torch.stack([torch.cat([values[f"pen[{t}]"], values[f"xy[{t}]"]], 1) for t in steps])
        features: Tensor = self.generator.of_x(x)
        return features


def strokes(sequences: Float[Tensor, "b t c"]) -> dict[str, Tensor]:
    """Sequences, the pen's bit first, as targets by name."""
    return {
        name: part
        for t, step in enumerate(sequences.unbind(dim=1))
        for name, part in ((f"pen[{t}]", step[:, :1]), (f"xy[{t}]", step[:, 1:]))
    }


def gaussian_of(outputs: Float[Tensor, "b k"]) -> Normal:
    """Mean and logarithm of the variance, side by side, as a Gaussian."""
    mean, log_variance = outputs.chunk(2, dim=1)
    return Normal(mean, (log_variance / 2).exp(), validate_args=False)


def _two_layers(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden))


def _three_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_two_layers(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
