"""ReverseDiffusion: against a loop over steps, branches and channels; its laws; that it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.kdiffusion.assignment import shuffled
from kdcore.kdiffusion.branches import add_branches, branch_taps
from kdcore.kdiffusion.guidance import guided_layer
from kdcore.kdiffusion.schedule import reverse_steps
from kdcore.kdiffusion.term import ReverseDiffusion, StudentVariance, Variant
from kdcore.models import MODELS
from kdcore.step import DistillStep
from kdcore.taps import Tapped
from kdcore.teachers import freeze, taught
from kdcore.types import Batch, Classifier, Outputs, Probe

VARIANTS: tuple[Variant, ...] = ("x0", "rollout", "trajectory", "average")
STAGE = {"stage": "stage"}
BRANCHES, ROWS, STUDENT, TEACHER = 4, 6, 2, 3

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def student() -> Outputs:
    features = {"stage": normal(ROWS, BRANCHES, STUDENT, 2, 4), "late": normal(ROWS, BRANCHES, 5)}
    return Outputs(normal(ROWS, 5), features)


@pytest.fixture
def batch() -> Batch:
    features = {"stage": 2 * normal(ROWS, TEACHER, 2, 2) + 1, "late": normal(ROWS, 4)}
    teacher = Outputs(normal(ROWS, 5), features, Classifier(normal(5, TEACHER), normal(5)))
    image, label = normal(ROWS, 3, 4, 4), torch.zeros(ROWS, dtype=torch.int64)
    return Batch(image, label, torch.arange(ROWS), teacher, epoch=0.25)


def make(student: Outputs, batch: Batch, layers: Any = None, **params: Any) -> ReverseDiffusion:
    torch.manual_seed(1)
    return ReverseDiffusion(layers or STAGE, Probe(student, batch), **params).double()


def value(term: ReverseDiffusion, student: Outputs, batch: Batch) -> Tensor:
    return term(student, batch.teacher, batch)


def asking(of: Outputs) -> Outputs:
    return replace(of, features={name: held.requires_grad_() for name, held in of.features.items()})


def by_loops(
    term: ReverseDiffusion, student: Outputs, batch: Batch, variant: str, variance: str, m: int
) -> Tensor:
    """The formulas of the specification's table, one step and one channel at a time."""
    assert batch.teacher is not None
    bridge = term.bridges[0]
    pooled = (student.features["stage"][..., ::2] + student.features["stage"][..., 1::2]) / 2
    projected = torch.einsum("bmchw,dc->mbdhw", pooled, bridge.projector.weight[:, :, 0])
    m = 1 if variant == "average" else m
    steps = reverse_steps("cosine", m)
    # which branch stands at each place: branch i stands at place number i of what is drawn
    order = shuffled(BRANCHES, term.assignments[0].seed, batch.epoch).argsort()
    losses = []
    for c in range(TEACHER):
        here, there = projected[:, :, c], batch.teacher.features["stage"][:, c]
        y = bridge.gain[c] * (here - here.mean()) / (here.var(correction=0) + 1e-5).sqrt()
        clean = (there - there.mean()) / (there.var(correction=0) + 1e-5).sqrt()
        sigma2 = y.detach().var(correction=0)
        state, start = torch.zeros_like(clean), sigma2
        for j in range(m):
            if variant == "average":
                estimate = y.mean(0)
            elif m == BRANCHES:
                estimate = y[order[j]]
            elif m == 2 * BRANCHES:
                estimate = y[order[j // 2]]
            else:
                estimate = (y[order[2 * j]] + y[order[2 * j + 1]]) / 2
            u, v, w = (float(law[j]) for law in steps.posterior)
            delta2 = torch.zeros(())
            if variance == "learned":
                delta2 = torch.log1p(term.variances[0].rho[j, c].exp()) + 1e-5
            if variant in ("x0", "average"):
                predicted, prior = w * sigma2 + v**2 * delta2, w
                error = v**2 * (clean - estimate) ** 2 + w * sigma2
            elif variant == "rollout":
                state, noise = u * state + v * estimate, float(steps.noise[j])
                predicted, prior = noise * sigma2 + delta2, noise
                error = (float(steps.amplitude[j]) * clean - state) ** 2 + noise * sigma2
            else:
                predicted, prior = w * sigma2 + delta2, w
                error = (u * state + v * clean - estimate) ** 2 + u**2 * start
                state, start = estimate.detach(), torch.zeros(())
            if variance == "fixed":
                predicted = max(prior, 0.01) * sigma2
            elif variance == "l2":
                predicted = torch.ones(())
            losses.append(0.5 * (predicted.log() + error / predicted).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("variance", "steps"),
    [
        ("learned", BRANCHES),
        ("learned", 2 * BRANCHES),
        ("learned", BRANCHES // 2),
        ("fixed", BRANCHES),
        ("l2", BRANCHES),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradients_are_those_of_the_loops(
    variant: Variant, variance: str, steps: int, student: Outputs, batch: Batch
) -> None:
    term = make(student, batch, variant=variant, variance=variance, steps=steps)
    seen = asking(student)
    leaves = [seen.features["stage"], *term.parameters()]
    loss, expected = (
        value(term, seen, batch),
        by_loops(term, seen, batch, variant, variance, steps),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(of, leaves) for of in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-11)
    assert all(bool((gradient != 0).any()) for gradient in gradients[0])


@pytest.mark.parametrize(
    ("variant", "steps"),
    # with one step of a trajectory nothing comes before, so nothing is cut from the graph
    [("x0", 4), ("rollout", 4), ("average", 4), ("trajectory", 1)],
)
def test_the_gradient_is_that_of_finite_differences(variant: Variant, steps: int) -> None:
    student = Outputs(normal(3, 5), {"stage": normal(3, 2, STUDENT, 1, 2)})
    teacher = Outputs(normal(3, 5), {"stage": normal(3, TEACHER, 1, 2)})
    batch = Batch(normal(3, 3, 4, 4), torch.zeros(3).long(), torch.arange(3), teacher)
    term = make(student, batch, variant=variant, steps=steps)

    def loss(feature: Tensor) -> Tensor:
        return value(term, replace(student, features={"stage": feature}), batch)

    assert torch.autograd.gradcheck(loss, asking(student).features["stage"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_ignores_the_order_of_the_rows(
    variant: Variant, student: Outputs, batch: Batch
) -> None:
    order, term = torch.tensor([3, 0, 5, 1, 4, 2]), make(student, batch, variant=variant)
    teacher = batch.teacher
    assert teacher is not None
    turned = replace(batch, teacher=replace(teacher, features=rows_of(teacher.features, order)))
    moved = value(term, replace(student, features=rows_of(student.features, order)), turned)
    torch.testing.assert_close(moved, value(term, student, batch), rtol=1e-12, atol=1e-12)


def rows_of(features: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    return {name: held[order] for name, held in features.items()}


def test_a_resumed_term_draws_what_the_undisturbed_one_would(
    student: Outputs, batch: Batch
) -> None:
    term = make(student, batch)
    torch.manual_seed(99)
    resumed = ReverseDiffusion(STAGE, Probe(student, batch)).double()
    later = replace(batch, epoch=17.5)
    assert value(resumed, student, later).item() != value(term, student, later).item()
    resumed.load_state_dict(term.state_dict())
    for _ in range(2):  # and again: nothing in it moves
        torch.testing.assert_close(
            value(resumed, student, later), value(term, student, later), rtol=0, atol=0
        )


@pytest.mark.parametrize(("order", "fewest", "most"), [("shuffle", 15, 24), ("strict", 1, 1)])
def test_the_order_changes_with_the_batch_and_not_in_strict_order(
    order: Any, fewest: int, most: int, student: Outputs, batch: Batch
) -> None:
    term = make(student, batch, order=order)
    batches = [replace(batch, epoch=number / 10) for number in range(50)]
    values = {round(value(term, student, batch).item(), 9) for batch in batches}
    assert fewest <= len(values) <= most  # of 4! orders


def test_a_plain_layer_is_one_branch(student: Outputs, batch: Batch) -> None:
    alone = {"stage": student.features["stage"][:, :1]}
    plain = {"stage": student.features["stage"][:, 0]}
    values = [
        value(make(replace(student, features=held), batch), replace(student, features=held), batch)
        for held in (alone, plain)
    ]
    torch.testing.assert_close(*values)


def test_several_stages_are_a_sum_and_each_learns_its_own(student: Outputs, batch: Batch) -> None:
    layers = {"stage": "stage", "late": "late"}
    both = make(student, batch, layers)
    total = torch.zeros((), dtype=torch.float64)
    for number, layer in enumerate(layers):
        one = make(student, batch, {layer: layer})
        state = {
            name.replace(f".{number}.", ".0."): held
            for name, held in both.state_dict().items()
            if f".{number}." in name
        }
        one.load_state_dict(state)
        total += value(one, student, batch).detach()
    torch.testing.assert_close(value(both, student, batch), total)
    assert int(both.assignments[0].seed) != int(both.assignments[1].seed)


def test_guidance_is_added_for_the_layer_that_the_classifier_reads(
    student: Outputs, batch: Batch
) -> None:
    layers = {"stage": "stage", "late": "late"}
    plain, guided = (make(student, batch, layers, guidance=weight) for weight in (0.0, 0.5))
    alone = [make(student, batch, guidance=weight) for weight in (0.0, 0.5)]
    for term in alone:
        term.bridges[0].load_state_dict(guided.bridges[0].state_dict())
    added = value(guided, student, batch) - value(plain, student, batch)
    expected = value(alone[1], student, batch) - value(alone[0], student, batch)
    assert added.item() > 0
    torch.testing.assert_close(added, expected)
    assert batch.teacher is not None
    assert batch.teacher.classifier is not None
    louder = Classifier(2 * batch.teacher.classifier.weight, batch.teacher.classifier.bias)
    batch = replace(batch, teacher=replace(batch.teacher, classifier=louder))
    torch.testing.assert_close(
        value(guided, student, batch) - value(plain, student, batch), 4 * added
    )


def test_of_layers_of_one_width_the_smallest_map_is_guided() -> None:
    features = {"early": normal(2, 3, 4, 4), "last": normal(2, 3, 2, 2), "token": normal(2, 3, 3)}
    teacher = Outputs(normal(2, 5), features, Classifier(normal(5, 3), normal(5)))
    assert guided_layer(teacher, ["last", "early", "token"]) == "last"
    assert guided_layer(teacher, ["token", "early", "last"]) == "last"


@pytest.mark.parametrize(
    ("layers", "classifier", "message"),
    [
        ({"late": "late"}, True, r"whose 3 channels its classifier reads, got {'late': \(6, 4\)}"),
        ({"stage": "stage"}, False, "its outputs carry none; set guidance to 0"),
    ],
)
def test_guidance_that_the_teacher_cannot_give_is_refused(
    layers: Mapping[str, str], classifier: bool, message: str, student: Outputs, batch: Batch
) -> None:
    if not classifier:
        batch = replace(batch, teacher=replace(batch.teacher, classifier=None))
    with pytest.raises(ValueError, match=message):
        make(student, batch, layers, guidance=1.0)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"stage": "late"}, r"layers 'stage': 'late': .* of the same kind; got \(6, 4, 2, 2, 4\)"),
        ({"stag": "stage"}, "unknown layer of the student 'stag'; did you mean 'stage'"),
        ({"stage": "early"}, "unknown layer of the teacher 'early'"),
    ],
)
def test_layers_that_cannot_be_compared_are_refused_by_name(
    layers: Mapping[str, str], message: str, student: Outputs, batch: Batch
) -> None:
    with pytest.raises(ValueError, match=message):
        make(student, batch, layers)


def test_a_batch_without_teacher_is_refused(student: Outputs, batch: Batch) -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        make(student, batch)(student, None, batch)


def test_a_variance_that_starts_at_zero_is_refused(student: Outputs, batch: Batch) -> None:
    with pytest.raises(ValueError, match=r"a variance starts above 0, got 0\.0"):
        make(student, batch, initial_variance=0.0)


def test_a_single_picture_and_blank_features_stay_finite(student: Outputs, batch: Batch) -> None:
    term = make(student, batch)
    one = Outputs(student.logits[:1], {"stage": torch.zeros(1, BRANCHES, STUDENT, 1, 1).double()})
    blank = Outputs(student.logits[:1], {"stage": torch.zeros(1, TEACHER, 1, 1).double()})
    seen = asking(one)
    loss = term(seen, blank, batch)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert bool(seen.features["stage"].grad.isfinite().all())


@pytest.fixture
def toy() -> tuple[Tapped, Batch]:
    """A student with branches and the outputs of a teacher, from a cache in float16."""
    teacher = freeze(Tapped(MODELS["convnet"](4, width=4), ["block3"]))
    label = torch.tensor([0, 1, 2, 3] * 4)
    image = torch.randn(16, 3, 8, 8) + label[:, None, None, None]
    batch = next(taught([Batch(image, label, torch.arange(16))], teacher))
    assert batch.teacher is not None
    net = add_branches(MODELS["convnet"](4, width=2), ["block3"], 4, kinds=("same", "1x1"))
    cached = replace(batch, teacher=batch.teacher.to(torch.float16))
    return Tapped(net, branch_taps(net).values()), cached


@pytest.mark.parametrize(
    ("variant", "variance"),
    [*((variant, "learned") for variant in VARIANTS), ("x0", "fixed"), ("rollout", "l2")],
)
def test_every_variant_trains_branches_and_term(
    variant: Variant, variance: str, toy: tuple[Tapped, Batch]
) -> None:
    student, batch = toy
    layers = {branch_taps(student.net)["block3"]: "block3"}
    with torch.no_grad():
        probe = Probe(student(batch.image), batch)
    # in units of its own variance, which shrinks in training, a fixed error weighs more and more
    unit: StudentVariance = "unit" if variance == "fixed" else "batch"
    term = ReverseDiffusion(
        layers, probe, variant=variant, variance=variance, student_variance=unit, guidance=0.1
    )
    step = DistillStep(student, {"diffusion": term}, {"diffusion": 1.0})
    optimizer = torch.optim.Adam(step.parameters(), lr=0.03)
    history = []
    for number in range(20):
        result = step(replace(batch, epoch=number / 10))
        optimizer.zero_grad()
        result.loss.backward()
        if number == 0:
            for name, parameter in step.named_parameters():
                assert parameter.grad is not None, name
                untrained = name.startswith("student.net.classifier")  # by cross-entropy alone
                assert untrained or bool((parameter.grad != 0).any()), name
        optimizer.step()
        history.append(float(result.loss.detach()))
    assert sum(history[-6:]) < sum(history[:6]) - 0.2, history
