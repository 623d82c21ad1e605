"""The models of the published experiments: their sizes, their graphs, and what they infer."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from kdcore.dgm.distiller import DGMDistiller
from kdcore.dgm.marginals import log_marginal
from kdcore.dgm.models.helmholtz import helmholtz_generator, helmholtz_recognition
from kdcore.dgm.models.ladder import SIZES, Ladder, LadderGenerator
from kdcore.dgm.models.ladder_vae import LadderVAE, product_of
from kdcore.dgm.models.residual import stages
from kdcore.dgm.models.vrnn import VRNN, VRNNGenerator, strokes
from kdcore.dgm.objective import PUBLISHED, Objective
from kdcore.dgm.trace import Trace
from kdcore.dgm.variational import Variational


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def digits(width: int = 4, **sizes: int) -> Ladder:
    return Ladder(width, image_size=8, sizes=(4, 2, 1), image_channels=1, **sizes)


# Chen et al. 2023, table 1 in millions, and generators counted from their code
LADDERS = {
    (64, 128): (6.60, 2_943_744),
    (64, 32): (0.44, 207_552),
    (64, 16): (0.12, 59_744),
    (64, 8): (0.04, 18_864),
    (32, 128): (5.39, 2_336_512),
    (32, 16): (0.10, 50_144),
    (32, 8): (0.03, 16_432),
    (32, 4): (0.01, 6_056),
}


@pytest.mark.parametrize(("image_size", "width"), LADDERS)
def test_ladders_have_the_published_numbers_of_parameters(image_size: int, width: int) -> None:
    with torch.device("meta"):
        model = LadderVAE(Ladder(width, image_size, SIZES[image_size]))
    millions, of_generator = LADDERS[image_size, width]
    assert round(count(model) / 1e6, 2) == millions
    assert count(model.generator) == of_generator


def test_the_conditional_ladder_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = LadderVAE(Ladder(64, 32, SIZES[32], num_conditions=2))
    assert round(count(model) / 1e6, 2) == 1.36
    assert round(count(model.generator) / 1e6, 2) == 0.62


@pytest.mark.parametrize(
    ("hidden", "state", "whole", "of_generator"),
    [(512, 1200, 14.4, 13.3), (128, 600, 2.42, 2.30)],
)
def test_the_vrnn_has_the_published_numbers_of_parameters(
    hidden: int, state: int, whole: float, of_generator: float
) -> None:
    with torch.device("meta"):
        model = VRNN(length=2, hidden=hidden, state=state)
    digits_shown = 1 if whole > 10 else 2
    assert round(count(model) / 1e6, digits_shown) == whole
    assert round(count(model.generator) / 1e6, digits_shown) == of_generator


@pytest.mark.parametrize(("width", "expected"), [(8, 186), (2, 54)])
def test_the_helmholtz_machine_has_the_published_number_of_parameters(
    width: int, expected: int
) -> None:
    assert count(helmholtz_generator(width)) == expected


@pytest.mark.parametrize("image_size", [32, 64])
def test_the_latents_of_a_ladder_have_the_published_sizes(image_size: int) -> None:
    run = Trace(2)
    image = LadderGenerator(Ladder(4, image_size, SIZES[image_size]))(run)
    shapes = {name: tuple(value.shape) for name, value in run.values("latent").items()}
    sizes = SIZES[image_size]
    assert shapes == {f"z{i}": (2, 16, size, size) for i, size in enumerate(sizes, start=1)}
    assert [*shapes] == ["z5", "z4", "z3", "z2", "z1"]
    assert image.shape == (2, 3, image_size, image_size)
    total = sum(value[0].numel() for value in run.values("latent").values())
    assert total == {32: 5_456, 64: 21_776}[image_size]


def test_a_ladder_may_repeat_a_size() -> None:
    run = Trace(2)
    model = LadderGenerator(Ladder(4, 8, (4, 2, 1, 1), image_channels=1))
    assert model(run).shape == (2, 1, 8, 8)
    assert run.sites["z3"].value.shape == run.sites["z4"].value.shape == (2, 16, 1, 1)


@pytest.mark.parametrize("sizes", [(), (4, 2), (4, 3, 1), (3, 1)])
def test_a_ladder_that_does_not_fit_its_picture_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must divide the picture's 8 and each other"):
        Ladder(4, 8, sizes)


def test_resolutions_between_powers_of_two_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two, got a factor of 3"):
        stages(4, 4, factor=3, resample="double")
    with pytest.raises(ValueError, match="z1 must be half as high as the picture of 8, got 2"):
        LadderVAE(Ladder(4, 8, (2, 1)))


def test_blocks_double_and_halve() -> None:
    maps = torch.randn(2, 3, 4, 4)
    assert stages(3, 5, factor=4, resample="double")(maps).shape == (2, 5, 16, 16)
    assert stages(3, 5, factor=4, resample="halve")(maps).shape == (2, 5, 1, 1)
    assert stages(3, 5, factor=1, resample="halve")(maps).shape == (2, 5, 4, 4)


def test_the_product_of_gaussians_is_that_of_their_densities() -> None:
    first = Normal(torch.tensor(0.3).double(), torch.tensor(0.8).double())
    second = Normal(torch.tensor(-1.1).double(), torch.tensor(1.7).double())
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = (first.log_prob(grid) + second.log_prob(grid)).softmax(0)
    product = product_of(first, second)
    mean = (density * grid).sum()
    torch.testing.assert_close(product.loc, mean)
    torch.testing.assert_close(product.variance, (density * (grid - mean) ** 2).sum())


def inferring(name: str) -> tuple[Variational, dict[str, Tensor], dict[str, Tensor]]:
    if name == "vrnn":
        sequence = torch.cat([torch.rand(5, 4, 1).round(), torch.randn(5, 4, 2)], dim=2)
        lengths = {"length": torch.tensor([4, 1, 2, 3, 4])}
        return VRNN(length=4, hidden=8, state=7, latent=3), strokes(sequence), lengths
    condition = {"condition": torch.eye(2).repeat(3, 1)[:5]} if name == "conditional" else {}
    model = LadderVAE(digits(num_conditions=2 if condition else 0))
    return model, {"y": torch.rand(5, 1, 8, 8)}, condition


@pytest.mark.parametrize("name", ["ladder", "conditional", "vrnn"])
def test_the_joint_run_is_the_generators_at_the_inferred_latents(name: str) -> None:
    model, observed, inputs = inferring(name)
    inferred = model.infer(observed, inputs=inputs)
    alone = Trace(5, inputs=inputs, values={**inferred.posterior.values("latent"), **observed})
    model.generator(alone)
    assert alone.sites.keys() == inferred.joint.sites.keys()
    torch.testing.assert_close(inferred.joint.log_prob(), alone.log_prob())
    for target, value in observed.items():
        torch.testing.assert_close(inferred.joint.sites[target].value, value, rtol=0, atol=0)
    assert inferred.posterior.sites.keys() == inferred.joint.of_kind("latent").keys()


@pytest.mark.parametrize("name", ["ladder", "conditional", "vrnn"])
def test_one_row_is_as_good_as_many(name: str) -> None:
    model, observed, inputs = inferring(name)
    model.eval()
    drawn = {**model.infer(observed, inputs=inputs).posterior.values("latent"), **observed}
    first, given = ({key: value[:1] for key, value in held.items()} for held in (drawn, inputs))
    whole, one = Trace(5, inputs=inputs, values=drawn), Trace(1, inputs=given, values=first)
    for run in (whole, one):
        model.generator(run)
    torch.testing.assert_close(one.log_prob(), whole.log_prob()[:1])


def test_rows_that_have_ended_count_nothing() -> None:
    model, observed, inputs = inferring("vrnn")
    changed = {name: value.clone() for name, value in observed.items()}
    changed["xy[3]"][1] += 5  # the second sequence has ended after its first step
    generator = torch.Generator()
    values = [
        model.infer(data, inputs=inputs, noise=generator.manual_seed(1)).joint.log_prob()
        for data in (observed, changed)
    ]
    torch.testing.assert_close(values[0], values[1])
    changed["xy[3]"][0] += 5
    other = model.infer(changed, inputs=inputs, noise=generator.manual_seed(1)).joint.log_prob()
    assert float(other[0].detach()) != float(values[0][0].detach())


def test_a_condition_is_heard_at_every_level() -> None:
    model = LadderGenerator(digits(num_conditions=2)).eval()
    runs = [Trace(1, inputs={"condition": torch.eye(2)[[c]]}) for c in (0, 1)]
    model(runs[0])
    runs[1] = Trace(1, inputs=runs[1].inputs, values=runs[0].values("latent"))
    model(runs[1])
    for name, site in runs[0].sites.items():
        here, there = site.distribution.mean, runs[1].sites[name].distribution.mean
        assert bool((here != there).any()), name


def test_the_helmholtz_machine_is_a_density() -> None:
    grid = torch.linspace(-7, 7, 60).double()
    y = torch.tensor(list(itertools.product(grid.tolist(), repeat=2))).double()
    observed = {"y1": y[:, :1], "y2": y[:, 1:]}
    with torch.no_grad():
        density = log_marginal(helmholtz_generator(8).double(), observed, len(y), inputs={}).exp()
    torch.testing.assert_close(
        density.sum() * (grid[1] - grid[0]) ** 2, torch.ones(()).double(), rtol=1e-3, atol=0
    )


@torch.no_grad()
def test_the_marginal_divergence_of_real_targets_is_its_integral() -> None:
    teacher, student = (helmholtz_generator(4).double() for _ in range(2))
    for parameter in teacher.parameters():
        parameter *= 2
    grid = torch.linspace(-7, 7, 40, dtype=torch.float64)
    y = torch.cartesian_prod(grid, grid)
    observed = {"y1": y[:, :1], "y2": y[:, 1:]}
    there, here = (log_marginal(m, observed, len(y), inputs={}) for m in (teacher, student))
    expected = (there.softmax(0) * (there - here)).sum()
    distiller = DGMDistiller(teacher, student, Objective(), mode="marginalized")
    value = distiller(2000, generator=torch.Generator().manual_seed(0)).loss
    torch.testing.assert_close(value, expected, rtol=0.1, atol=0)


def test_the_recognition_of_a_helmholtz_machine_has_its_latents() -> None:
    run = Trace(3, inputs={"y1": torch.randn(3, 1), "y2": torch.randn(3, 1)})
    helmholtz_recognition(8)(run)
    dream = Trace(3)
    helmholtz_generator(8)(dream)
    assert run.sites.keys() == dream.of_kind("latent").keys()


FAMILIES = {
    "ladder_vae": lambda width: LadderGenerator(digits(width)),
    "vrnn": lambda width: VRNNGenerator(length=3, hidden=width, state=width, latent=4),
    "helmholtz": helmholtz_generator,
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("objective", ["published", "kl"])
def test_every_model_distils_into_a_narrower_one(name: str, objective: str) -> None:
    teacher, student = FAMILIES[name](8), FAMILIES[name](2)
    chosen = PUBLISHED[name] if objective == "published" else Objective()
    result = DGMDistiller(teacher, student, chosen)(6)
    result.loss.backward()
    assert bool(result.loss.isfinite())
    grads = {key: parameter.grad for key, parameter in student.named_parameters()}
    assert all(grad is not None for grad in grads.values())
