"""Pictures from a teacher: a parametrisation, changed until the priors are content."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kdcore.datafree.changeable import mean_over_workers
from kdcore.datafree.draws import Draw, rows_of_worker
from kdcore.datafree.images import Normalisation
from kdcore.datafree.parametrisations import parametrisation
from kdcore.datafree.plans import Method
from kdcore.datafree.priors import Priors
from kdcore.datafree.requirements import check_ensemble, check_students, check_teacher
from kdcore.datafree.seen import Seen
from kdcore.datafree.targets import Records, classes_in_turn, drawn_targets
from kdcore.taps import Tapped


@dataclass(frozen=True)
class Round:
    """What one round of synthesis has made."""

    image: Float[Tensor, "b c h w"]  # in the network's space, without a graph
    label: Int[Tensor, " b"]  # the class in turn, which targets may be drawn for
    losses: tuple[float, ...]  # step by step, the mean over workers
    parts: Mapping[str, float]  # the priors' values in the last step, without their weights


@final
class Synthesizer:
    """A teacher and a method; ``round()`` after ``round()`` of pictures.

    ``shape`` is (C, H, W). The students are those against which pictures are made, unwrapped where
    DDP trains them; neither their weights nor their gradients are touched. The batch is shared by
    the workers, and what they make together is what one would make alone. Classes are in turn from
    picture to picture; ``first`` is the number of the first, where others have made those before.

    Raises ValueError for a teacher that is not frozen, for one without BatchNorm where the method
    needs it (with the methods that work), and for a method that needs a student and has none.
    """

    def __init__(
        self,
        teacher: Tapped,
        method: Method,
        *,
        shape: Sequence[int],
        normalisation: Normalisation,
        students: Sequence[nn.Module] = (),
        records: Records | None = None,
        seed: int = 0,
        first: int = 0,
    ) -> None:
        check_teacher(teacher, method)
        check_students(students, method)
        check_ensemble(method)
        self.teacher, self.method = teacher, method
        self.students, self.records = tuple(students), records
        self.seed, self.first = seed, first
        self.shape = tuple(shape)
        self.normalisation = normalisation
        self.like = next(teacher.parameters())
        self.rounds = self.count = 0  # of synthesis; of occasions on which numbers were drawn
        with _seeded(seed):
            self.made = parametrisation(method.images, shape, normalisation, teacher)
            self.priors = Priors(method.priors, self._blank(shape))
        heads = list(self.priors.parameters())
        self.heads = torch.optim.Adam(heads, method.images.lr) if heads else None

    def round(self, steps: int | None = None) -> Round:
        """Make one batch by so many steps of the optimiser, by default the method's."""
        steps = self.method.schedule.steps if steps is None else steps
        draw = self.draw()
        picture = self.first + self.rounds * self.method.schedule.batch_size + draw.row
        label = classes_in_turn(picture, len(self.teacher.head.bias))
        target = label
        if self.method.targets is not None:
            target = drawn_targets(
                self.method.targets, draw, picture, self.teacher, self.records
            ).detach()
        self.made.begin(draw)
        losses: list[float] = []
        best: Tensor | None = None
        least = math.inf
        parts: dict[str, float] = {}
        with self._students_ready():
            for _ in range(steps):
                pictures = self.made.pictures()
                loss, parts = self._judge(pictures, target)
                losses.append(float(mean_over_workers(loss.detach())))
                if losses[-1] < least:
                    least = losses[-1]
                    best = torch.cat(pictures).detach().clone()  # the step below changes pixels
                    self.priors.keep()
                self._step(loss)
        if best is None or self.method.keep == "last":
            with torch.no_grad():
                best = torch.cat(self.made.pictures()).detach().clone()
        self.made.end()
        self.priors.remember()
        self.rounds += 1
        return Round(best, label, tuple(losses), parts)

    def sample(self) -> Float[Tensor, "b c h w"]:
        """A fresh batch from what the generators have learned."""
        return self.made.sample(self.draw())

    def again(self) -> Float[Tensor, "b c h w"]:
        """The pictures of the last round's latents, as the generators now make them."""
        with torch.no_grad():
            return torch.cat(self.made.pictures())

    def draw(self) -> Draw:
        """A new occasion to draw numbers for this worker's pictures."""
        self.count += 1
        rows = rows_of_worker(self.method.schedule.batch_size, self.like.device)
        return Draw(rows, self.count, self.seed)

    def _judge(self, pictures: Sequence[Tensor], target: Tensor) -> tuple[Tensor, dict[str, float]]:
        draw, count = self.draw(), len(pictures)
        total, parts = self.like.new_zeros(()), Counter[str]()
        for number, image in enumerate(pictures):
            seen = self._seen(image, target[number::count], draw.part(number, count))
            loss, said = self.priors(seen, self.rounds)
            total = total + loss
            parts.update({name: float(value) / count for name, value in said.items()})
        if not bool(torch.isfinite(total)):
            values = ", ".join(f"{name} = {part:.4g}" for name, part in parts.items())
            raise FloatingPointError(
                f"the loss of the pictures is {total.item()} ({values}); lower the learning rate "
                "of the pictures or that prior's weight"
            )
        return total, dict(parts)

    def _seen(self, image: Tensor, target: Tensor, draw: Draw) -> Seen:
        return Seen(
            image,
            target,
            draw,
            augmentation=self.method.view,
            normalisation=self.normalisation,
            teacher=self.teacher,
            students=self.students,
        )

    def _step(self, loss: Tensor) -> None:
        changed, heads = self.made.changed(), list(self.priors.parameters())
        # of these alone: the student's gradients are its own step's
        gradients = torch.autograd.grad(
            loss, [*changed, *heads], allow_unused=True, materialize_grads=True
        )
        self.made.step(gradients[: len(changed)])
        if self.heads is not None:
            for held, gradient in zip(heads, gradients[len(changed) :], strict=True):
                held.grad = mean_over_workers(gradient)
            self.heads.step()

    @contextmanager
    def _students_ready(self) -> Iterator[None]:
        """The students in the method's mode, and back in theirs whatever happens."""
        modes = [student.training for student in self.students]
        try:
            for student in self.students:
                student.train(self.method.student_mode == "train")
            yield
        finally:
            for student, training in zip(self.students, modes, strict=True):
                student.train(training)

    def _blank(self, shape: Sequence[int]) -> Seen:
        image = self.like.new_zeros(2, *shape)
        draw = Draw(torch.arange(2, device=image.device), 0, self.seed)
        return self._seen(image, image, draw)

    def state_dict(self) -> dict[str, Any]:
        """Generators, memories, optimisers, and how far the drawing of numbers has come."""
        return {
            "made": self.made.state_dict(),
            "priors": self.priors.state_dict(),
            "heads": {} if self.heads is None else self.heads.state_dict(),
            "rounds": self.rounds,
            "count": self.count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.made.load_state_dict(state["made"])
        self.priors.load_state_dict(state["priors"])
        if self.heads is not None:
            self.heads.load_state_dict(state["heads"])
        self.rounds, self.count = state["rounds"], state["count"]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Networks drawn from torch's own generator, which is afterwards where it was.

    It is the CPU's, on which networks are drawn; no other is touched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU's too
        yield
