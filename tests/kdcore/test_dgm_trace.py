"""A run keeps what its model met and hands out what it was given; declared models are runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Beta, Independent, Normal, Poisson

from kdcore.dgm.conditionals import (
    BernoulliOf,
    CategoricalOf,
    LearnedBernoulli,
    NormalOf,
    StandardNormal,
)
from kdcore.dgm.families import Delta
from kdcore.dgm.graph import DGM, Node
from kdcore.dgm.trace import Trace


def unit(run: Trace, width: int = 2) -> Normal:
    zero = torch.zeros(run.num_rows, width)
    return Normal(zero, torch.ones_like(zero))


def test_given_noise_and_values_are_handed_out_and_values_win() -> None:
    noise, value = torch.randn(2, 3, 2)
    law = Normal(torch.full((3, 2), 5.0), torch.full((3, 2), 2.0))
    run = Trace(3, noise={"a": noise, "b": noise}, values={"b": value})
    torch.testing.assert_close(run.latent("a", law), 5 + 2 * noise)
    assert run.latent("b", law) is value
    assert run.noise().keys() == {"a"}
    assert run.values("latent").keys() == {"a", "b"}
    assert run.values("target") == {}


def test_the_noise_of_a_run_makes_the_run_again() -> None:
    first = Trace(4)
    value = first.latent("z", unit(first))
    again = Trace(4, noise=first.noise())
    torch.testing.assert_close(again.latent("z", unit(again)), value, rtol=0, atol=0)


def test_runs_of_one_generator_are_the_same() -> None:
    values = []
    for _ in range(2):
        run = Trace(4, generator=torch.Generator().manual_seed(7))
        values.append(torch.cat([run.latent("z", unit(run)), run.target("y", unit(run))]))
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)


def test_a_target_has_no_gradient_and_a_latent_has() -> None:
    centre = torch.zeros(3, 2, requires_grad=True)
    run = Trace(3, values={"given": centre * 2})
    assert run.latent("z", Normal(centre, torch.ones(3, 2))).requires_grad
    assert not run.target("y", Normal(centre, torch.ones(3, 2))).requires_grad
    assert not run.target("given", Normal(centre, torch.ones(3, 2))).requires_grad


@pytest.mark.parametrize("kind", ["mean", "mode"])
def test_targets_may_be_set_to_what_is_typical(kind: str) -> None:
    run = Trace(3, targets=kind)  # type: ignore[arg-type]
    torch.testing.assert_close(run.target("y", unit(run)), torch.zeros(3, 2))


def test_a_target_needs_no_way_from_noise() -> None:
    run = Trace(2000)
    value = run.target("y", Poisson(torch.full((2000,), 3.0)))
    torch.testing.assert_close(value.mean(), torch.tensor(3.0), rtol=0, atol=0.2)
    with pytest.raises(TypeError, match="use register_family"):
        run.latent("z", Beta(torch.ones(2000), torch.ones(2000)))
    with pytest.raises(TypeError, match="draws from its global state"):
        Trace(2, generator=torch.Generator()).target("y", Poisson(torch.ones(2)))


def test_the_log_density_is_summed_over_variables_and_masked() -> None:
    values = {"z": torch.randn(3, 2), "y": torch.randn(3, 2)}
    run, mask = Trace(3, values=values), torch.tensor([1.0, 0.0, 1.0])
    run.latent("z", unit(run))
    run.feature("f", torch.randn(3, 5))
    run.target("y", Independent(unit(run), 1), mask=mask)
    of_z, of_y = (Normal(0.0, 1.0).log_prob(values[name]).sum(1) for name in ("z", "y"))
    torch.testing.assert_close(run.log_prob(), of_z + mask * of_y)
    torch.testing.assert_close(run.log_prob(["latent"]), of_z)


def test_a_run_without_random_variables_has_no_density() -> None:
    run = Trace(3)
    run.feature("f", torch.randn(3, 5))
    with pytest.raises(ValueError, match="no random variable of the kinds"):
        run.log_prob()


def test_a_name_comes_once() -> None:
    run = Trace(3)
    run.latent("z", unit(run))
    with pytest.raises(ValueError, match=r"two variables 'z'; number them, as in 'z\[3\]'"):
        run.target("z", unit(run))


@pytest.mark.parametrize("what", ["noise", "value"])
def test_tensors_that_torch_would_broadcast_are_refused(what: str) -> None:
    given = {"z": torch.zeros(3, 1)}
    run = Trace(3, noise=given) if what == "noise" else Trace(3, values=given)
    with pytest.raises(ValueError, match=rf"'z' has {what} of shape \(3, 2\), was given \(3, 1\)"):
        run.latent("z", unit(run))


def test_an_input_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="unknown input 'imag'; did you mean 'image'"):
        Trace(1, inputs={"image": torch.zeros(1)}).input("imag")


def declared() -> DGM:
    return DGM(
        [
            Node("x", kind="input"),
            Node("bits", (), "latent", LearnedBernoulli(3)),
            Node("noise", (), "latent", StandardNormal([2])),
            Node("both", ["bits", "noise"], "deterministic", lambda b, n: torch.cat([b, n], 1)),
            Node("more", ["bits", "x"], "latent", BernoulliOf(nn.Linear(7, 2))),
            Node("y", ["both", "more"], "target", NormalOf(nn.Linear(7, 3), scale=0.5)),
            Node("label", ["y"], "target", CategoricalOf(nn.Linear(3, 4), temperature=2.0)),
        ]
    )


def test_a_declared_model_runs_from_causes_to_effects() -> None:
    model, run = declared(), Trace(6, inputs={"x": torch.randn(6, 4)})
    values = model(run)
    assert [*run.sites] == ["bits", "noise", "more", "y", "label"]
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "x": (6, 4),
        "bits": (6, 3),
        "noise": (6, 2),
        "both": (6, 5),
        "more": (6, 2),
        "y": (6, 3),
        "label": (6,),
    }
    assert run.of_kind("target").keys() == {"y", "label"}
    assert len(list(model.parameters())) == 1 + 2 + 2 + 2
    logits = model.conditionals["label"].net(values["y"]) / 2
    torch.testing.assert_close(run.sites["label"].distribution.logits, logits.log_softmax(1))


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([Node("x", kind="input"), Node("x", kind="input")], "two nodes are named 'x'"),
        ([Node("y", ["z"], "target", Delta)], r"'y' has the parents \['z'\]"),
        ([Node("z")], "'z' of kind 'latent' needs a conditional"),
        ([Node("x", (), "input", Delta)], "'x' of kind 'input' needs no conditional"),
    ],
)
def test_a_declaration_that_is_no_model_is_refused(nodes: list[Node], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DGM(nodes)


def test_a_root_belongs_to_every_row_with_its_own_noise() -> None:
    run = Trace(5)
    declared_root = DGM([Node("z", (), "latent", StandardNormal([2]))])
    value: Tensor = declared_root(run)["z"]
    assert len(value.unique()) == 10
