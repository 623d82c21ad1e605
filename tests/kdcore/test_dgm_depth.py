"""Below several latents the surrogate's student makes up for what it got wrong above."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from kdcore.dgm.distiller import DGMDistiller, Mode
from kdcore.dgm.marginals import marginal_divergence
from kdcore.dgm.objective import Objective
from kdcore.dgm.trace import Trace

DEPTH, WIDTH, RANK, STEPS = 4, 6, 4, 150


class Chain(nn.Module):
    """z4 -> z3 -> z2 -> z1 -> y by linear maps, each with noise of deviation one half."""

    def __init__(self, maps: list[nn.Module]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, run: Trace) -> None:
        z = run.latent(f"z{DEPTH}", law(torch.zeros(run.num_rows, WIDTH).double(), 1.0))
        for level in range(DEPTH - 1, 0, -1):
            z = run.latent(f"z{level}", law(self.maps[level](z), 0.5))
        run.target("y", law(self.maps[0](z), 0.5))


def law(mean: Tensor, deviation: float) -> Normal:
    return Normal(mean, torch.full_like(mean, deviation), validate_args=False)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False).double()


def distilled(mode: Mode) -> tuple[float, float]:
    """The exact divergence of the targets' marginals before and after distillation."""
    torch.manual_seed(0)
    teacher = Chain([linear(WIDTH, WIDTH) for _ in range(DEPTH)])
    for own in teacher.maps:
        nn.init.orthogonal_(own.weight)
    narrow = [nn.Sequential(linear(WIDTH, RANK), linear(RANK, WIDTH)) for _ in range(DEPTH)]
    student = Chain(narrow)
    step = DGMDistiller(teacher, student, Objective(), mode=mode)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    before = divergence(teacher, student)
    for _ in range(STEPS):
        optimizer.zero_grad()
        step(32).loss.backward()
        optimizer.step()
    return before, divergence(teacher, student)


def divergence(teacher: Chain, student: Chain) -> float:
    with torch.no_grad():
        return float(marginal_divergence("kl", teacher, student, 1, inputs={}))


def test_at_depth_four_ours_is_no_further_than_local() -> None:
    (before, ours), (_, local) = distilled("surrogate"), distilled("local")
    assert ours < 0.9 * before
    assert ours <= 1.05 * local
