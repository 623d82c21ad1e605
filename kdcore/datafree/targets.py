"""What a picture is to make the teacher say: a class, a drawn prediction, drawn activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kdcore.datafree.dirichlet import dirichlet
from kdcore.datafree.draws import Draw, Stream
from kdcore.rows import unit_rows
from kdcore.taps import EMBEDDING, Tapped
from kdcore.types import Batch

LOGITS = "logits"


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Every class as often as every other, to within one picture."""


@dataclass(frozen=True, kw_only=True)
class DirichletPredictions:
    """Predictions around each class in turn, of all classes with one concentration, then the next.

    Source: Nayak and others 2019 (ZSKD), arXiv:1905.08114, section 3.2. Their code normalises the
    similarities again after scaling them, so that both of its concentrations are 1.
    """

    concentrations: tuple[float, ...] = (1.0, 0.1)
    floor: float = 1e-4  # added to what a Dirichlet distribution wants positive


@dataclass(frozen=True, kw_only=True)
class GaussianPredictions:
    """Predictions from activations drawn with the correlations that a layer's weights have.

    ``embedding`` draws what enters the classifier, from the layer that makes it; ``logits`` from
    the classifier itself. ``positive`` cuts the embedding at 0, as a ReLU does.

    Source: Wang 2021, arXiv:2104.04868, sections 3.1 and 3.2, who finds the embedding the best
    layer and a deviation of 1.5 (MNIST) to 2 (CIFAR-10), and is silent on ReLU and temperature.
    """

    layer: Literal["embedding", "logits"] = EMBEDDING  # type: ignore[assignment]
    deviation: float = 1.5
    positive: bool = True
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RecordedActivations:
    """Activations of the logits as they were recorded on real data: see ``measure_records``.

    ``published`` multiplies the noise by the covariance itself, whose square the sample then has.

    Source: Lopes, Fenu & Starner 2017, arXiv:1710.07535, and its code.
    """

    published: bool = False


Targets = Classes | DirichletPredictions | GaussianPredictions | RecordedActivations

# A drawn prediction may be of another class than the one around which it is drawn, if of any.
AIMED = (Classes, RecordedActivations)


@dataclass(frozen=True)
class Records:
    """Mean and covariance of the teacher's logits over the real pictures of each class."""

    mean: Float[Tensor, "k d"]
    covariance: Float[Tensor, "k d d"]


@torch.no_grad()
def measure_records(teacher: Tapped, batches: Iterable[Batch], num_classes: int) -> Records:
    """What the teacher says of real pictures, class by class: these have to be seen once.

    Raises ValueError for a class of which there are none.
    """
    said = [(teacher(batch.image).logits, batch.label) for batch in batches]
    logits, label = (torch.cat(parts) for parts in zip(*said, strict=True))
    counts = torch.bincount(label, minlength=num_classes)
    if bool((counts == 0).any()):
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"records need pictures of every class; there are none of {empty}")
    rows = [logits[label == number] for number in range(num_classes)]
    covariance = [torch.cov(of_class.mT, correction=0) for of_class in rows]
    return Records(
        torch.stack([of_class.mean(dim=0) for of_class in rows]), torch.stack(covariance)
    )


def class_similarity(weight: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
    r"""Cosines of the classifier's rows, each row of them stretched to [0, 1].

    Source: Nayak and others 2019 (ZSKD), arXiv:1905.08114, equation 3. Without the stretch, which
    the paper mentions only in passing, a cosine may be negative and no parameter of a Dirichlet.
    """
    cosines = correlations(weight)
    least, most = cosines.amin(dim=1, keepdim=True), cosines.amax(dim=1, keepdim=True)
    return (cosines - least) / (most - least)


def correlations(weight: Float[Tensor, "k ..."]) -> Float[Tensor, "k k"]:
    """Cosines between the incoming weights of each two units of a layer."""
    rows = unit_rows(weight.flatten(1))
    return rows @ rows.mT


def symmetric_root(matrix: Float[Tensor, "*n d d"]) -> Float[Tensor, "*n d d"]:
    """The symmetric square root of a matrix that may lack rank, as correlations of many units do.

    Not Cholesky's, which needs full rank; and it does not depend on the signs of eigenvectors.
    """
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
    return root


def classes_in_turn(picture: Int[Tensor, " b"], num_classes: int) -> Int[Tensor, " b"]:
    """Each picture's class, by its number among all that are made."""
    return picture % num_classes


def drawn_targets(
    targets: Targets,
    draw: Draw,
    picture: Int[Tensor, " b"],
    teacher: Tapped,
    records: Records | None,
) -> Tensor:
    """What the pictures of these numbers, which give their classes, are to make the teacher say.

    Raises ValueError for recorded activations without records.
    """
    weight, bias = teacher.head
    label = classes_in_turn(picture, len(weight))
    if isinstance(targets, DirichletPredictions):
        turn = (picture // len(weight)) % len(targets.concentrations)
        beta = weight.new_tensor(targets.concentrations)[turn]
        return dirichlet(draw, beta[:, None] * class_similarity(weight)[label] + targets.floor)
    if isinstance(targets, GaussianPredictions):
        producing = weight if targets.layer == LOGITS else _embedding_weight(teacher)
        noise = draw.normal((len(producing),), Stream.NORMAL_TARGET).to(weight)
        drawn = targets.deviation * noise @ symmetric_root(correlations(producing))
        if targets.layer != LOGITS:
            drawn = F.linear(F.relu(drawn) if targets.positive else drawn, weight, bias)
        return (drawn / targets.temperature).softmax(dim=1)
    if isinstance(targets, RecordedActivations):
        if records is None:
            raise ValueError(
                "this method aims at recorded activations: measure_records() makes the records "
                "from real pictures"
            )
        factor = records.covariance if targets.published else symmetric_root(records.covariance)
        noise = draw.normal(records.mean.shape[1:], Stream.NORMAL_TARGET).to(weight)
        return records.mean[label] + torch.einsum("bi,bij->bj", noise, factor[label])
    return label


def _embedding_weight(teacher: Tapped) -> Tensor:
    """The weights that make the embedding: of the last layer before the classifier, by width."""
    width = teacher.head.weight.shape[1]
    making: Sequence[Tensor] = [
        module.weight
        for name, module in teacher.net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and name != teacher.classifier
        and len(module.weight) == width
    ]
    if not making:
        raise ValueError(
            f"no convolution or linear layer makes the embedding of width {width}; "
            "let the targets be drawn from the logits"
        )
    return making[-1]
