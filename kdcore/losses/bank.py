"""Contrast with a memory of every row of the dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kdcore.losses.contrast import noise_contrast
from kdcore.losses.samples import samples
from kdcore.rows import gather_rows, unit_rows
from kdcore.terms import Term, feature_of, one_label, present
from kdcore.types import Batch, Outputs, Probe


@final
class MemoryContrast(Term):
    r"""How hard it is to tell a row's remembered teacher from those of other rows, and vice versa.

    .. math:: \mathrm{NCE}(x^s) + \mathrm{NCE}(x^t), \quad
        x^s_{bk} = \frac1{Z_s} e^{\langle v^s_b, m^t_k \rangle / \tau}, \quad
        m_b \leftarrow \frac{\mu m_b + (1 - \mu) v_b}{\| \mu m_b + (1 - \mu) v_b \|}

    with v a learned linear embedding of unit length, m its running mean for each row of the
    dataset, and NCE ``noise_contrast``. Z is N times the mean of the first batch's numerators and
    constant from then on. Maps and tokens are averaged over positions; pairs of layers are summed.

    In training mode each batch is remembered, after it has been scored, from the gathered rows of
    all workers; in evaluation mode nothing is. The noise of a step is one random set of rows for
    the whole batch, which one matrix product scores; the whole bank, where it has no more than
    ``num_negatives``. A row is no noise for one of the same class, once it has been seen; one that
    never is stays a random vector. Banks, Z and generator are buffers: a resumed run goes on with
    the same draws.

    Raises ValueError where the number of rows is unknown.

    Source: Tian, Krishnan & Isola 2020 (CRD), arXiv:1910.10699, section 3.1, and the bank of their
    code, which draws the noise of each sample by itself and exactly ``num_negatives`` of it.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        probe: Probe,
        *,
        dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        if probe.num_rows < 1:
            raise ValueError(
                "this loss remembers every row of the dataset and the number of rows is unknown "
                "here (Probe.num_rows); use infonce, which needs no memory"
            )
        self._layers = dict(layers)
        taught = present(probe.batch.teacher)
        self.banks = nn.ModuleList(
            _Bank(*rows, probe.num_rows, dim, num_negatives, temperature, momentum)
            for rows in self._pairs(probe.student, taught)
        )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        pairs = zip(self.banks, self._pairs(student, present(teacher)), strict=True)
        return torch.stack([bank(*rows, batch) for bank, rows in pairs]).sum()

    def _pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        return [
            samples(
                feature_of("student", student, here),
                feature_of("teacher", teacher, there),
                normalise="none",
                positions="pool",
            )
            for here, there in self._layers.items()
        ]


@final
class _Bank(nn.Module):
    """The embeddings of one pair of layers, and what is remembered of them."""

    student: Tensor
    teacher: Tensor
    normalisers: Tensor
    label: Tensor
    random_state: Tensor

    def __init__(
        self,
        student: Float[Tensor, "b d_s"],
        teacher: Float[Tensor, "b d_t"],
        num_rows: int,
        dim: int,
        num_negatives: int,
        temperature: float,
        momentum: float,
    ) -> None:
        super().__init__()
        self._num_negatives, self._temperature = num_negatives, temperature
        self._momentum = momentum
        self.embed_student = nn.Linear(student.shape[1], dim)
        self.embed_teacher = nn.Linear(teacher.shape[1], dim)
        for name in ("student", "teacher"):
            self.register_buffer(name, unit_rows(torch.randn(num_rows, dim)))
        self.register_buffer("normalisers", torch.zeros(2))  # zero until the first batch
        self.register_buffer("label", torch.full((num_rows,), -1))  # -1 until a row is seen
        seed = int(torch.randint(2**31, ()))
        self.register_buffer("random_state", torch.Generator().manual_seed(seed).get_state())

    def forward(
        self, student: Float[Tensor, "b d_s"], teacher: Float[Tensor, "b d_t"], batch: Batch
    ) -> Float[Tensor, ""]:
        here = unit_rows(self.embed_student(student))
        there = unit_rows(self.embed_teacher(teacher))
        noise, label = self._draw().to(batch.index.device), one_label(batch)
        is_noise = (noise != batch.index[:, None]) & (self.label[noise] != label[:, None])
        of_student = self._scores(here, self.teacher, batch.index, noise)
        of_teacher = self._scores(there, self.student, batch.index, noise)
        normalisers = self._settled(of_student, of_teacher)
        loss = self._contrast(of_student / normalisers[0], is_noise)
        loss = loss + self._contrast(of_teacher / normalisers[1], is_noise)
        if self.training:
            self._remember(here, there, batch)
        return loss

    def _draw(self) -> Int[Tensor, " k"]:
        """The rows that are this step's noise; a step in training mode moves the generator on."""
        generator = torch.Generator()
        generator.set_state(self.random_state.cpu())
        rows = torch.randperm(len(self.label), generator=generator)[: self._num_negatives]
        if self.training:
            self.random_state.copy_(generator.get_state())
        return rows

    def _scores(
        self,
        anchor: Float[Tensor, "b d"],
        bank: Float[Tensor, "n d"],
        index: Int[Tensor, " b"],
        noise: Int[Tensor, " k"],
    ) -> Float[Tensor, "b k1"]:
        """The numerators of x: of a row's own memory first, then of the noise."""
        own = (anchor * bank[index]).sum(dim=1, keepdim=True)
        products = torch.cat([own, anchor @ bank[noise].mT], dim=1)
        return (products / self._temperature).exp()

    @torch.no_grad()
    def _settled(
        self, of_student: Float[Tensor, "b k1"], of_teacher: Float[Tensor, "b k1"]
    ) -> Float[Tensor, " sides"]:
        """Z of both sides; settled for good by the first batch of all workers in training."""
        if bool(self.normalisers.all()):
            return self.normalisers
        means = torch.stack([of_student.mean(), of_teacher.mean()])
        first = gather_rows(means[None]).mean(dim=0) * len(self.label)
        if self.training:
            self.normalisers.copy_(first)
        return first

    def _contrast(
        self, scores: Float[Tensor, "b k1"], is_noise: Bool[Tensor, "b k"]
    ) -> Float[Tensor, ""]:
        return noise_contrast(scores[:, 0], scores[:, 1:], is_noise, num_rows=len(self.label))

    @torch.no_grad()
    def _remember(self, here: Tensor, there: Tensor, batch: Batch) -> None:
        index = gather_rows(batch.index)
        self.label[index] = gather_rows(batch.label)
        for bank, seen in ((self.student, here), (self.teacher, there)):
            moved = self._momentum * bank[index] + (1 - self._momentum) * gather_rows(seen)
            bank[index] = unit_rows(moved)
