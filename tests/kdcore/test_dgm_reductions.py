"""What the one loss becomes for models of other distillation methods: exact equalities."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from kdcore.dgm.conditionals import CategoricalOf
from kdcore.dgm.distiller import DGMDistiller
from kdcore.dgm.divergences import divergence
from kdcore.dgm.families import Delta
from kdcore.dgm.graph import DGM, Node
from kdcore.dgm.objective import Objective
from kdcore.dgm.trace import Trace
from kdcore.losses.logits import kd

ALL_SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=3)))


def exactly(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs).double()


class Sequences(nn.Module):
    """Three tokens of a vocabulary of three, each given those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(4, 8).double(), nn.GRUCell(8, 8).double()
        self.out = linear(8, 3)
        with torch.no_grad():
            self.out.weight *= 4

    def forward(self, run: Trace) -> None:
        state = torch.zeros(run.num_rows, 8).double()
        token = torch.full((run.num_rows,), 3)
        for t in range(3):
            state = self.cell(self.embedding(token), state)
            token = run.target(f"y[{t}]", Categorical(logits=self.out(state)))


def tokens(sequences: Tensor) -> dict[str, Tensor]:
    return {f"y[{t}]": sequences[:, t] for t in range(3)}


def log_prob(model: nn.Module, sequences: Tensor) -> Tensor:
    run = Trace(len(sequences), values=tokens(sequences))
    model(run)
    return run.log_prob()


@pytest.fixture
def image() -> Mapping[str, Tensor]:
    return {"x": torch.randn(32, 6).double()}


def test_a_classifier_without_latents_is_vanilla_distillation(image: Mapping[str, Tensor]) -> None:
    there, here = linear(6, 5), linear(6, 5)
    tau = 4.0

    def classifier(net: nn.Module) -> DGM:
        label = CategoricalOf(net, temperature=tau)
        return DGM([Node("x", kind="input"), Node("y", ["x"], "target", label)])

    result = DGMDistiller(classifier(there), classifier(here), Objective())(32, inputs=image)
    student, teacher = here(image["x"]), there(image["x"])
    soft = F.log_softmax(student / tau, 1), F.softmax(teacher / tau, 1)
    exactly(result.loss * tau**2, F.kl_div(*soft, reduction="batchmean") * tau**2)
    exactly(result.loss * tau**2, kd(student, teacher, temperature=tau))


@torch.no_grad()
def test_sequences_of_the_teacher_give_the_divergence_over_all_sequences() -> None:
    teacher, student = Sequences(), Sequences()
    there, here = (log_prob(model, ALL_SEQUENCES) for model in (teacher, student))
    torch.testing.assert_close(there.exp().sum(), torch.ones(()).double())
    expected = (there.exp() * (there - here)).sum()
    loss = DGMDistiller(teacher, student, Objective())(50_000).loss
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0)


def test_enumerated_sequences_give_it_exactly() -> None:
    teacher, student = Sequences(), Sequences()
    there, here = (log_prob(model, ALL_SEQUENCES) for model in (teacher, student))
    loss = DGMDistiller(teacher, student, Objective(), mode="marginalized")(1).loss
    exactly(loss, (there.exp() * (there - here)).sum())


def test_the_best_sequence_alone_is_sequence_level_distillation() -> None:
    # Kim & Rush 2016, arXiv:1606.07947, section 3.2: the teacher's law is replaced by its mode
    teacher, student = Sequences(), Sequences()
    best = ALL_SEQUENCES[log_prob(teacher, ALL_SEQUENCES).argmax()][None]
    student_run = Trace(1, values=tokens(best))
    student(student_run)
    loss = sum(
        divergence("cross_entropy", Delta(best[:, t]), student_run.sites[f"y[{t}]"].distribution)
        for t in range(3)
    )
    exactly(loss, -log_prob(student, best))


def test_sequences_of_the_data_are_word_level_distillation() -> None:
    teacher, student = Sequences(), Sequences()
    data = ALL_SEQUENCES[torch.randint(27, (16,))]
    loss = DGMDistiller(teacher, student, Objective())(16, targets=tokens(data)).loss
    expected = torch.zeros(()).double()
    for row in data:
        states = [torch.zeros(1, 8).double() for _ in range(2)]
        before = torch.tensor([3])
        for token in row:
            states = [
                model.cell(model.embedding(before), state)
                for model, state in zip((teacher, student), states, strict=True)
            ]
            p, q = (m.out(s).softmax(1) for m, s in zip((teacher, student), states, strict=True))
            expected = expected + (p * (p / q).log()).sum() / 16
            before = token[None]
    exactly(loss, expected)


class Featured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = linear(6, 7), linear(7, 5)

    def forward(self, run: Trace) -> None:
        feature = run.feature("feature", self.body(run.input("x")))
        run.target("y", Categorical(logits=self.head(feature)))


def test_a_deterministic_latent_is_feature_distillation(image: Mapping[str, Tensor]) -> None:
    teacher, student = Featured(), Featured()
    objective = Objective(latent="squared_w2", latent_weight=0.3)
    result = DGMDistiller(teacher, student, objective)(32, inputs=image)
    there, here = teacher.body(image["x"]), student.body(image["x"])
    plain = kd(student.head(here), teacher.head(there), temperature=1.0)
    exactly(result.loss, plain + 0.3 * F.mse_loss(here, there, reduction="sum") / 32)


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(linear(4, 9), nn.Tanh())

    def forward(self, run: Trace) -> None:
        zero = torch.zeros(run.num_rows, 4).double()
        run.target("y", Delta(self.net(run.latent("z", Normal(zero, torch.ones_like(zero))))))


def test_a_deterministic_target_is_distillation_of_a_generator() -> None:
    teacher, student = Generator(), Generator()
    objective = Objective("squared_w2", "squared_w2")
    result = DGMDistiller(teacher, student, objective)(64)
    assert result.teacher is not None
    z = result.teacher.sites["z"].value
    expected = F.mse_loss(student.net(z), teacher.net(z), reduction="sum") / 64
    exactly(result.loss, expected)
    assert float(result.latent["z"]) == 0
    gradient = torch.autograd.grad(expected, student.net[0].weight)
    exactly(torch.autograd.grad(result.loss, student.net[0].weight)[0], gradient[0])


@pytest.mark.parametrize("make", [Sequences, Featured])
def test_a_student_that_is_its_teacher_has_no_loss(
    make: type[nn.Module], image: Mapping[str, Tensor]
) -> None:
    teacher = make()
    objective = Objective(latent="squared_w2")
    result = DGMDistiller(teacher, teacher, objective)(32, inputs=image)
    assert float(result.loss) == 0
    assert result.teacher is not None
    assert result.student is not None
    for name, site in result.teacher.sites.items():
        torch.testing.assert_close(result.student.sites[name].value, site.value, rtol=0, atol=0)
