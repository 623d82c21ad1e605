"""The distiller's choices: regimes, weights, reductions, latents of other names and sizes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from kdcore.dgm.conditionals import LearnedBernoulli, NormalOf, StandardNormal
from kdcore.dgm.coupling import first_dimensions
from kdcore.dgm.distiller import DGMDistiller
from kdcore.dgm.graph import DGM, Node
from kdcore.dgm.objective import PUBLISHED, Objective
from kdcore.dgm.trace import Trace


class Ladder(nn.Module):
    """z2 -> z1 -> y, all Gaussian; names and widths as asked."""

    def __init__(self, *, width: int = 3, names: tuple[str, str] = ("z2", "z1")) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2 * width), nn.Linear(width, 4)
        self.norm = nn.BatchNorm1d(4)
        self.names = names
        self.double()

    def forward(self, run: Trace) -> None:
        zero = self.first.weight.new_zeros(run.num_rows, 3)
        above = run.latent(self.names[0], Normal(zero, torch.ones_like(zero)))
        mean, log_scale = self.first(above).chunk(2, dim=1)
        z = run.latent(self.names[1], Normal(mean, log_scale.exp()))
        y = self.norm(self.second(z))
        run.target("y", Normal(y, torch.full_like(y, 0.5)))


class Steps(nn.Module):
    """Three steps of a bit that depends on the last target, masked as told."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.of_z, self.of_y = nn.Linear(1, 2).double(), nn.Linear(2, 1).double()
        self.mask = mask

    def forward(self, run: Trace) -> None:
        y = torch.zeros(run.num_rows, 1).double()
        for t in range(3):
            mask = None if self.mask is None else self.mask[:, t]
            z = run.latent(f"z[{t}]", Bernoulli(logits=self.of_z(y)), mask=mask)
            mean = self.of_y(z)
            y = run.target(f"y[{t}]", Normal(mean, torch.ones_like(mean)), mask=mask)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(teacher: Ladder, student: Ladder, *, local: bool) -> tuple[Tensor, Tensor, Trace]:
    """Target and latent divergences of every row, from the formulas."""
    run = Trace(6, generator=seeded())
    with torch.no_grad():
        teacher(run)
    noise, z_t = run.noise(), run.values("latent")
    mean, log_scale = student.first(noise["z2"]).chunk(2, dim=1)
    z = z_t["z1"] if local else mean + log_scale.exp() * noise["z1"]
    y = student.norm(student.second(z))
    latent = kl_divergence(run.sites["z1"].distribution, Normal(mean, log_scale.exp()))
    target = kl_divergence(run.sites["y"].distribution, Normal(y, torch.full_like(y, 0.5)))
    return target, latent, run


@pytest.fixture
def pair() -> tuple[Ladder, Ladder]:
    return Ladder().eval(), Ladder().eval()


@pytest.mark.parametrize("mode", ["surrogate", "local"])
def test_the_regimes_hand_over_noise_or_values(mode: Any, pair: tuple[Ladder, Ladder]) -> None:
    target, latent, _ = by_hand(*pair, local=mode == "local")
    distiller = DGMDistiller(*pair, Objective(latent_weight=0.3), mode=mode).eval()
    result = distiller(6, generator=seeded())
    torch.testing.assert_close(result.target["y"], target.detach().sum(1).mean())
    torch.testing.assert_close(result.latent["z1"], latent.detach().sum(1).mean())
    torch.testing.assert_close(result.loss, (target.sum(1) + 0.3 * latent.sum(1)).mean())


def test_latents_are_averaged_over_their_dimensions_if_asked(pair: tuple[Ladder, Ladder]) -> None:
    target, latent, _ = by_hand(*pair, local=False)
    objective = Objective(latent_weight=0.3, over_dims="mean")
    loss = DGMDistiller(*pair, objective).eval()(6, generator=seeded()).loss
    torch.testing.assert_close(loss, (target.sum(1) + 0.3 * latent.mean(1)).mean())


def test_each_group_of_latents_may_have_its_weight(pair: tuple[Ladder, Ladder]) -> None:
    target, latent, _ = by_hand(*pair, local=False)
    for weights, expected in (({"z1": 0.7}, 0.7), ({"z2": 5.0}, 0.0)):
        loss = DGMDistiller(*pair, Objective(latent_weight=weights)).eval()(6, generator=seeded())
        torch.testing.assert_close(loss.loss, (target.sum(1) + expected * latent.sum(1)).mean())


def test_a_weight_of_no_group_is_refused(pair: tuple[Ladder, Ladder]) -> None:
    distiller = DGMDistiller(*pair, Objective(latent_weight={"z9": 1.0}))
    with pytest.raises(ValueError, match="unknown group of latents 'z9'"):
        distiller(2)


def test_steps_are_one_group_summed_or_averaged() -> None:
    teacher, student = Steps(), Steps()
    summed = DGMDistiller(teacher, student, Objective())(5, generator=seeded())
    mean = DGMDistiller(teacher, student, Objective(over_steps="mean"))(5, generator=seeded())
    assert summed.latent.keys() == {"z"}
    assert summed.target.keys() == {"y"}
    torch.testing.assert_close(mean.loss, summed.loss / 3)
    by_site = [
        kl_divergence(summed.teacher.sites[name].distribution, site.distribution).sum(1).mean()
        for name, site in summed.student.sites.items()
    ]
    torch.testing.assert_close(summed.loss, torch.stack(by_site).sum())


def test_masked_rows_count_nothing() -> None:
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]).double()
    teacher, student = Steps(mask), Steps(mask)
    result = DGMDistiller(teacher, student, Objective())(2)
    expected = torch.zeros(()).double()
    for step in range(3):
        for name in (f"z[{step}]", f"y[{step}]"):
            there, here = (run.sites[name] for run in (result.teacher, result.student))
            value = kl_divergence(there.distribution, here.distribution).sum(1)
            expected = expected + (value * mask[:, step]).mean()
    torch.testing.assert_close(result.loss, expected)


def test_samples_of_noise_are_as_many_rows(pair: tuple[Ladder, Ladder]) -> None:
    alone = DGMDistiller(*pair, Objective()).eval()(12, generator=seeded())
    result = DGMDistiller(*pair, Objective(), num_noise=4).eval()(3, generator=seeded())
    torch.testing.assert_close(result.loss, alone.loss)
    with pytest.raises(ValueError, match="at least one sample of noise, got 0"):
        DGMDistiller(*pair, Objective(), num_noise=0)


def test_inputs_are_repeated_beside_their_noise() -> None:
    def model() -> DGM:
        net = NormalOf(nn.Linear(5, 2).double(), scale=1.0)
        prior = StandardNormal([2]).double()
        nodes = [Node("x", kind="input"), Node("z", (), "latent", prior)]
        return DGM([*nodes, Node("y", ["x", "z"], "target", net)])

    x = torch.randn(2, 3).double()
    result = DGMDistiller(model(), model(), Objective(), num_noise=3)(2, inputs={"x": x})
    assert result.student is not None
    torch.testing.assert_close(result.student.input("x"), x.repeat_interleave(3, dim=0))


def test_a_teachers_run_may_be_used_again(pair: tuple[Ladder, Ladder]) -> None:
    distiller = DGMDistiller(*pair, Objective()).eval()
    fresh = distiller(6, generator=seeded())
    again = distiller(6, teacher_trace=distiller.run_teacher(6, generator=seeded()))
    torch.testing.assert_close(again.loss, fresh.loss, rtol=0, atol=0)


def test_latents_of_other_names_are_matched(pair: tuple[Ladder, Ladder]) -> None:
    teacher, student = pair
    renamed = Ladder(names=("a", "b"))
    renamed.load_state_dict(student.state_dict())
    expected = DGMDistiller(teacher, student, Objective()).eval()(6, generator=seeded())
    distiller = DGMDistiller(
        copy.deepcopy(teacher), renamed, Objective(), match={"z2": "a", "z1": "b"}
    )
    result = distiller.eval()(6, generator=seeded())
    torch.testing.assert_close(result.loss, expected.loss)
    assert result.latent.keys() == {"a", "b"}


def test_steps_are_matched_by_group() -> None:
    class Renamed(Steps):
        def forward(self, run: Trace) -> None:
            y = torch.zeros(run.num_rows, 1).double()
            for t in range(3):
                z = run.latent(f"state[{t}]", Bernoulli(logits=self.of_z(y)))
                mean = self.of_y(z)
                y = run.target(f"y[{t}]", Normal(mean, torch.ones_like(mean)))

    teacher, student = Steps(), Renamed()
    plain = Steps()
    plain.load_state_dict(student.state_dict())
    expected = DGMDistiller(teacher, plain, Objective())(5, generator=seeded())
    result = DGMDistiller(teacher, student, Objective(), match={"z": "state"})
    torch.testing.assert_close(result(5, generator=seeded()).loss, expected.loss)


def test_a_shallower_student_is_compared_where_they_meet() -> None:
    shallow = DGM(
        [
            Node("z2", (), "latent", StandardNormal([3]).double()),
            Node("y", ["z2"], "target", NormalOf(nn.Linear(3, 4).double(), scale=0.5)),
        ]
    )
    result = DGMDistiller(Ladder(), shallow, Objective())(6)
    assert result.latent.keys() == {"z2"}
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in shallow.parameters())
    # and the other way round: the teacher has no noise for z1, which is drawn
    deeper = DGMDistiller(copy.deepcopy(shallow), Ladder(), Objective())(6)
    assert deeper.student is not None
    assert deeper.student.noise().keys() == {"z2", "z1"}


def test_noise_of_another_size_asks_for_a_map() -> None:
    distiller = DGMDistiller(Ladder(width=5), Ladder(width=2), Objective())
    with pytest.raises(ValueError, match=r"'z1' has noise of shape .*need `noise_maps` or `match`"):
        distiller(6)


def test_latents_of_another_size_are_compared_through_an_adapter() -> None:
    teacher, student = Ladder(width=5).eval(), Ladder(width=2).eval()
    adapter = nn.Linear(2, 5).double()
    distiller = DGMDistiller(
        teacher,
        student,
        Objective(latent_weight={"z1": 0.3}),
        noise_maps={"z1": first_dimensions(2)},
        adapters={"z1": adapter},
    ).eval()
    result = distiller(6)
    there, here = (run.sites["z1"].distribution.mean for run in (result.teacher, result.student))
    expected = (there - adapter(here)).square().sum(1).mean()
    torch.testing.assert_close(result.latent["z1"], expected.detach())
    torch.testing.assert_close(result.loss.detach(), result.target["y"] + 0.3 * expected.detach())
    result.loss.backward()
    assert adapter.weight.grad is not None


def test_local_distillation_of_other_sizes_is_refused() -> None:
    distiller = DGMDistiller(Ladder(width=5), Ladder(width=2), Objective(), mode="local")
    with pytest.raises(ValueError, match="'z1' has value of shape"):
        distiller(6)


def test_targets_of_other_names_are_refused() -> None:
    def model(target: str) -> DGM:
        law = NormalOf(nn.Linear(2, 1), scale=1.0)
        return DGM(
            [Node("z", (), "latent", StandardNormal([2])), Node(target, ["z"], "target", law)]
        )

    with pytest.raises(ValueError, match=r"same targets.*\['y'\].*\['w'\]"):
        DGMDistiller(model("y"), model("w"), Objective())(2)


def test_the_teacher_is_frozen_and_its_moments_do_not_move() -> None:
    teacher, student = Ladder(), Ladder()
    before = copy.deepcopy(teacher.state_dict())
    distiller = DGMDistiller(teacher, student, Objective()).train()
    distiller(6).loss.backward()
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert student.norm.training
    assert not teacher.norm.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def bits() -> DGM:
    out = NormalOf(nn.Linear(2, 1).double(), scale=0.5)
    return DGM(
        [Node("z", (), "latent", LearnedBernoulli(2).double()), Node("y", ["z"], "target", out)]
    )


@pytest.mark.parametrize(("gradient", "reached"), [("none", False), ("straight_through", True)])
def test_the_target_trains_what_is_above_a_bit_only_straight_through(
    gradient: Any, reached: bool
) -> None:
    student = bits()
    distiller = DGMDistiller(bits(), student, Objective(latent_weight=0.0), gradient=gradient)
    distiller(20).loss.backward()
    above = student.conditionals["z"].logits.grad
    assert bool((above != 0).any()) is reached


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_objectives_run_and_train(name: str, pair: tuple[Ladder, Ladder]) -> None:
    teacher, student = (Steps(), Steps()) if name != "ladder_vae" else pair
    DGMDistiller(teacher, student, PUBLISHED[name])(6).loss.backward()
    grads: Mapping[str, Tensor | None] = {n: p.grad for n, p in student.named_parameters()}
    assert all(grad is not None for grad in grads.values())


def test_half_precision_is_compared_in_full() -> None:
    teacher, student = Ladder().float(), Ladder().float()
    distiller = DGMDistiller(teacher, student, Objective())
    with torch.autocast("cpu", torch.bfloat16):
        result = distiller(6)
    assert result.student is not None
    assert result.student.sites["z1"].value.dtype is torch.bfloat16
    assert result.loss.dtype is torch.float32


def test_a_student_learns_its_teacher() -> None:
    teacher, student = Ladder().eval(), Ladder().eval()
    distiller = DGMDistiller(teacher, student, Objective()).eval()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = distiller(64).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 * losses[0]
