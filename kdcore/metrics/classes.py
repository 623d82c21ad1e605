"""One number per class from two labelled samples, and one number from those of all classes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Reduction = Literal["sum", "mean_present", "mean_classes", "frequency"]


class Shared(NamedTuple):
    """The labels of two samples as places in one list of the classes that occur in either.

    ``counts`` says how often each class of the list occurs in either sample.
    """

    student: Int[Tensor, " n"]
    teacher: Int[Tensor, " m"]
    counts: tuple[Int[Tensor, " c"], Int[Tensor, " c"]]

    @property
    def num(self) -> int:
        """How many classes there are."""
        return len(self.counts[0])


def shared_classes(student_label: Int[Tensor, " n"], teacher_label: Int[Tensor, " m"]) -> Shared:
    """Labels of any values, renumbered without gaps; of one minibatch only once."""
    if student_label is teacher_label:
        _, index, count = torch.unique(student_label, return_inverse=True, return_counts=True)
        return Shared(index, index, (count, count))
    classes, index = torch.unique(torch.cat([student_label, teacher_label]), return_inverse=True)
    here, there = index.split([len(student_label), len(teacher_label)])
    counts = [torch.bincount(part, minlength=len(classes)) for part in (here, there)]
    return Shared(here, there, (counts[0], counts[1]))


def reduced(
    values: Float[Tensor, " c"],
    classes: Shared,
    *,
    reduction: Reduction = "frequency",
    num_classes: int | None = None,
) -> Float[Tensor, ""]:
    r"""One number from one value per class, over the classes that both samples have.

    .. math:: \sum_c v_c, \quad \frac1{|\text{present}|} \sum_c v_c, \quad \frac1K \sum_c v_c,
        \quad \sum_c \frac{n_c}{\sum_{c'} n_{c'}} v_c

    in the order of ``Reduction``; :math:`n_c` counts the student's sample. Without a common class
    the value is a zero that still has a graph. The published KD2M prints the third and runs the
    first, so that its weight means K times as much. Only the last gives each sample one weight.

    Raises ValueError for "mean_classes" without ``num_classes``.
    """
    weights = class_weights(classes, values, reduction=reduction, num_classes=num_classes)
    return weights @ torch.where(weights > 0, values, 0.0)


def class_weights(
    classes: Shared, like: Tensor, *, reduction: Reduction, num_classes: int | None
) -> Float[Tensor, " c"]:
    """What each class counts in ``reduced``, in a tensor's type; 0 where a sample lacks it."""
    here, there = classes.counts
    present = there > 0
    if reduction == "frequency":
        counted = (here * present).to(like)
        return counted / counted.sum().clamp(min=1)
    counted = ((here > 0) & present).to(like)
    if reduction == "mean_present":
        return counted / counted.sum().clamp(min=1)
    if reduction == "mean_classes":
        if num_classes is None:
            raise ValueError("reduction 'mean_classes' needs num_classes, the classes of the task")
        return counted / num_classes
    return counted


def class_sums(
    rows: Float[Tensor, "n d"], index: Int[Tensor, " n"], num: int
) -> Float[Tensor, "c d"]:
    """The sum of the rows of each class, without a loop over classes."""
    return rows.new_zeros(num, rows.shape[1]).index_add(0, index, rows)


def class_means(
    rows: Float[Tensor, "n d"], index: Int[Tensor, " n"], num: int
) -> Float[Tensor, "c d"]:
    """The mean of the rows of each class; zero for a class without rows."""
    count = torch.bincount(index, minlength=num).clamp(min=1).to(rows)
    return class_sums(rows, index, num) / count[:, None]


def class_mean_distance(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "m d"],
    student_label: Int[Tensor, " n"],
    teacher_label: Int[Tensor, " m"],
    *,
    reduction: Reduction = "frequency",
    num_classes: int | None = None,
) -> Float[Tensor, ""]:
    r"""Squared distance between the means of each class: MMD with a linear kernel, by class.

    .. math:: v_c = \| \mu_{S|c} - \mu_{T|c} \|^2, \quad \text{reduced over } c
    """
    classes = shared_classes(student_label, teacher_label)
    difference = class_means(student, classes.student, classes.num) - class_means(
        teacher, classes.teacher, classes.num
    )
    values = difference.square().sum(dim=1)
    return reduced(values, classes, reduction=reduction, num_classes=num_classes)
